"""An export holds exactly what the tables say, as the viewer wants it, and never two autoencoders' files."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pytest

from sae.jobs import compact, export
from sae.jobs.exports import folder, viewer_json
from sae.jobs.lake import connect
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, IncompleteError, LakeError
from sae.schemas.viewer import AtomFile, Manifest
from tests.lakes import BIN_WIDTH, CORPUS, DEAD, EXAMPLES, N_LATENTS, NAME, TOKENS, Small, encode, small_lake
from tests.tiny_run import sae

FOLDER = f"tiny/v5_l8_postmlp/n{N_LATENTS}/k3"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_lake(tmp_path_factory.mktemp("pristine") / "lake")


@pytest.fixture
def small(pristine: Small, tmp_path: Path) -> Small:
    return pristine.copy(tmp_path / "lake")


def changed(config: Run, **export_keys: Any) -> Run:
    return config.model_copy(update={"export": config.export.model_copy(update=export_keys)})


def folder_of(small: Small) -> Path:
    return Path(small.config.export.folder) / FOLDER


def files(small: Small) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder_of(small) / "atoms").iterdir()}


def atoms(small: Small) -> dict[int, AtomFile]:
    return {int(name.removesuffix(".json")): AtomFile.model_validate_json(data) for name, data in files(small).items()}


def manifest(small: Small) -> Manifest:
    return Manifest.model_validate_json((folder_of(small) / "manifest.json").read_bytes())


def test_statistics_equal_a_dense_computation(small: Small) -> None:
    export.run(small.config)
    exported = atoms(small)
    assert exported.keys() == set(range(N_LATENTS))
    for atom, file in exported.items():
        positive = small.acts[:, :, atom][small.acts[:, :, atom] > 0].astype(np.float64)
        if atom == DEAD:
            continue
        mean, squared, cubed, fourth = (float((positive**power).sum()) / small.n_tokens for power in (1, 2, 3, 4))
        assert file.density == len(positive) / small.n_tokens
        # The two sums add in another order: a few units in the last place of a double.
        assert file.mean_act == pytest.approx(mean, rel=1e-12)
        assert file.mean_act_squared == pytest.approx(squared, rel=1e-12)
        assert file.skew == pytest.approx(cubed / squared**1.5, rel=1e-12)
        assert file.kurtosis == pytest.approx(fourth / squared**2, rel=1e-12)
        assert file.hist == Counter(str(math.ceil(act / BIN_WIDTH)) for act in positive)


def test_sequences_equal_the_dense_activations_of_their_contexts(small: Small) -> None:
    export.run(small.config)
    for atom, file in atoms(small).items():
        for sequence in [*file.top, *file.random]:
            tokens = small.contexts[int(sequence.doc_id)]
            acts = small.acts[int(sequence.doc_id), : len(tokens), atom].astype(np.float64)
            assert sequence.token_ints == tokens
            assert sequence.tokens == [TOKENS[token] for token in tokens]
            assert sequence.acts == pytest.approx(acts, abs=0.5e-4 + 1e-12)  # four decimals
            assert sequence.density == np.count_nonzero(acts) / len(tokens)
            assert sequence.act > 0


def test_top_holds_the_contexts_with_the_highest_activation(small: Small) -> None:
    export.run(small.config)
    for atom, file in atoms(small).items():
        peaks = small.acts[:, :, atom].max(axis=1)
        best = sorted(np.flatnonzero(peaks), key=lambda context: (-peaks[context], context))[:EXAMPLES]
        assert [sequence.doc_id for sequence in file.top] == best
        assert [sequence.idx for sequence in file.top] == [int(small.acts[c, :, atom].argmax()) for c in best]


def test_values_equal_what_sql_gives(small: Small) -> None:
    export.run(changed(small.config, decimals=2))
    connection = connect(small.config.lake)
    columns = "atom, density, mean_act, mean_act_squared, skew, kurtosis"
    for atom, *statistics in connection.execute(f"select {columns} from atoms").fetchall():
        file = atoms(small)[atom]
        assert [file.density, file.mean_act, file.mean_act_squared, file.skew, file.kurtosis] == statistics
        for kind, sequences in (("top", file.top), ("random", file.random)):
            query = "select round(act::double, 2), pos from examples where atom = $1 and kind = $2 order by rank"
            expected = connection.execute(query, [atom, kind]).fetchall()
            assert [(sequence.act, sequence.idx) for sequence in sequences] == expected


def test_an_atom_that_never_fired_has_an_empty_file_of_the_same_shape(small: Small) -> None:
    export.run(small.config)
    assert json.loads(files(small)[f"{DEAD}.json"]) == {
        "density": 0.0,
        "mean_act": 0.0,
        "mean_act_squared": 0.0,
        "skew": None,
        "kurtosis": None,
        "hist": {},
        "top": [],
        "random": [],
    }


def test_files_are_json_without_nan_or_infinity(small: Small) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    export.run(small.config)
    for data in files(small).values():
        sequences = json.loads(data.decode("utf-8"), parse_constant=refuse)["top"]
        assert all(
            set(sequence) == {"tokens", "acts", "act", "idx", "doc_id", "density", "token_ints"}
            for sequence in sequences
        )


def test_the_manifest_says_what_the_files_were_made_from(small: Small) -> None:
    export.run(small.config)
    found = manifest(small)
    assert found.complete
    assert (found.autoencoder, found.model, found.hook) == (NAME, "models/tiny", "blocks.1.hook_resid_pre")
    assert (found.corpora, found.n_tokens, found.masked_positions) == ([CORPUS], small.n_tokens, [0])
    assert (found.n_latents, found.k, found.bin_width, found.atoms) == (N_LATENTS, 3, BIN_WIDTH, (0, N_LATENTS - 1))
    assert found.lake_version == small.lake.snapshot().version


def test_a_second_run_writes_nothing(small: Small) -> None:
    export.run(small.config)
    written = {path: path.stat().st_mtime_ns for path in folder_of(small).rglob("*.json")}
    export.run(small.config)
    assert {path: path.stat().st_mtime_ns for path in folder_of(small).rglob("*.json")} == written


def test_files_do_not_depend_on_compaction(small: Small, tmp_path: Path) -> None:
    export.run(small.config)
    before = files(small)
    compact.run(small.config)
    export.run(changed(small.config, folder=str(tmp_path / "after")))
    after = {path.name: path.read_bytes() for path in (tmp_path / "after" / FOLDER / "atoms").iterdir()}
    assert after == before


@pytest.mark.parametrize("lost", ["atoms/3.json", "manifest is incomplete"])
def test_an_export_that_is_not_whole_is_made_again(small: Small, lost: str) -> None:
    export.run(small.config)
    whole = files(small)
    (folder_of(small) / "atoms" / "3.json").unlink()
    if lost == "manifest is incomplete":
        (folder_of(small) / "atoms" / "3.json").write_text("{}")
        cut = manifest(small).model_copy(update={"complete": False})
        (folder_of(small) / "manifest.json").write_text(cut.model_dump_json())
    export.run(small.config)
    assert files(small) == whole
    assert manifest(small).complete


def test_files_are_what_their_model_would_be_written_as(small: Small) -> None:
    export.run(small.config)
    for name, file in atoms(small).items():
        assert files(small)[f"{name}.json"] == file.model_dump_json(exclude_unset=True).encode()


def test_several_processes_write_what_one_does(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export.run(small.config)
    monkeypatch.setattr(folder, "ATOMS_PER_TASK", 3)
    monkeypatch.setattr(export, "FORMATS", {"openai": replace(viewer_json.FORMAT, at_once=2)})
    export.run(changed(small.config, folder=str(tmp_path / "parallel")))
    after = {path.name: path.read_bytes() for path in (tmp_path / "parallel" / FOLDER / "atoms").iterdir()}
    assert after == files(small)


def test_what_an_interrupted_export_has_done_is_not_done_again(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    export.run(small.config)
    whole = files(small)
    cut = manifest(small).model_copy(update={"complete": False})
    (folder_of(small) / "manifest.json").write_text(cut.model_dump_json())
    (folder_of(small) / "progress.json").write_text(
        json.dumps({"source": cut.source, "done": [[0, 3]], "seconds": 1e6})
    )
    (folder_of(small) / "atoms" / (".tmp-" + "0" * 32)).write_text("of a process that was killed")
    (folder_of(small) / "atoms" / "6.json").unlink()
    times = {atom: (folder_of(small) / "atoms" / f"{atom}.json").stat().st_mtime_ns for atom in range(4)}
    monkeypatch.setattr(folder, "ATOMS_PER_TASK", 4)
    export.run(small.config)
    assert files(small) == whole
    assert times == {atom: (folder_of(small) / "atoms" / f"{atom}.json").stat().st_mtime_ns for atom in range(4)}
    assert manifest(small).complete
    assert 1e6 < (manifest(small).seconds or 0.0) < 1.001e6, "of both commands together"
    assert not (folder_of(small) / "progress.json").exists()


def test_examples_of_other_latents_are_told_in_one_line(small: Small) -> None:
    examples = small.lake.read(small.lake.snapshot().select("examples"))
    moved = pa.array(examples["act"].to_numpy() * 2)
    wrong = examples.set_column(examples.schema.get_field_index("act"), examples.schema.field("act"), moved)
    with small.lake.transaction("aggregate") as transaction:
        transaction.remove(transaction.base.select("examples"))
        transaction.write("examples", wrong, autoencoder=NAME)
    with pytest.raises(LakeError, match=r"an example of atom 0 of small is not among its latents; run sae aggregate"):
        export.run(small.config)
    assert not manifest(small).complete


def test_a_range_holds_those_atoms_only(small: Small) -> None:
    export.run(small.config)
    whole = files(small)
    export.run(changed(small.config, atoms=(2, 4)))
    assert files(small) == {f"{atom}.json": whole[f"{atom}.json"] for atom in (2, 3, 4)}
    assert manifest(small).atoms == (2, 4)


@pytest.mark.parametrize("atoms", [(0, N_LATENTS), (4, 2)])
def test_a_range_beyond_the_autoencoder_is_refused(small: Small, atoms: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"export\.atoms: got {atoms[0]} to {atoms[1]}; .* atoms 0 to 7"):
        export.run(changed(small.config, atoms=atoms))


def test_new_runs_must_be_aggregated_first(small: Small) -> None:
    with small.lake.transaction("drop") as transaction:
        transaction.forget([f"encode/{NAME}/{CORPUS}/2"])
        last = [file for file in small.lake.snapshot().files.values() if file.run == 2]
        transaction.remove(last)
    with pytest.raises(IncompleteError, match="older than its encoded runs; run sae aggregate first"):
        export.run(small.config)
    assert not Path(small.config.export.folder).exists()
    encode(small, 2)
    export.run(small.config)


def test_a_folder_of_another_autoencoder_is_refused_and_left_as_it_is(small: Small, tmp_path: Path) -> None:
    export.run(small.config)
    before = files(small)
    other = small_lake(tmp_path / "other_lake", seed=1, name="other")
    with pytest.raises(ConfigError, match=r"holds autoencoder small of models/tiny .* not other"):
        export.run(changed(other.config, folder=small.config.export.folder))
    assert files(small) == before


def test_a_folder_with_atoms_of_unknown_origin_is_refused(small: Small) -> None:
    (folder_of(small) / "atoms").mkdir(parents=True)
    (folder_of(small) / "atoms" / "0.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds atoms but no manifest\.json"):
        export.run(small.config)
    assert files(small) == {"0.json": b"{}"}


def test_a_manifest_that_cannot_be_read_is_refused(small: Small) -> None:
    folder_of(small).mkdir(parents=True)
    (folder_of(small) / "manifest.json").write_text('{"complete": tr')
    with pytest.raises(ConfigError, match=r"manifest\.json is not a manifest"):
        export.run(small.config)


@pytest.mark.parametrize(
    "path", ["{nope}/n{n_latents}", "../{subject}", "/abs", "", "{subject", "{}", "{subject.model}", "{k:d}"]
)
def test_a_faulty_path_template_is_refused(small: Small, path: str) -> None:
    with pytest.raises(ConfigError, match=r"export\.path: got .* may hold \{subject\}") as caught:
        export.run(changed(small.config, path=path))
    assert "\n" not in str(caught.value)


def test_the_path_template_is_filled(small: Small) -> None:
    export.run(changed(small.config, path="{autoencoder}-{corpus}/{hook}/{k}"))
    folder = Path(small.config.export.folder) / f"{NAME}-{CORPUS}" / "blocks.1.hook_resid_pre" / "3"
    assert (folder / "manifest.json").exists()


def test_the_folder_tells_the_size_that_was_trained_not_the_one_in_the_config(small: Small) -> None:
    other = small.config.autoencoder.model_copy(update={"n_latents": 2 * N_LATENTS, "k": 1})
    export.run(small.config.model_copy(update={"autoencoder": other}))
    assert manifest(small).n_latents == N_LATENTS


def test_a_job_does_not_export_into_its_copy_of_the_working_directory(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(small.config.model_dump(mode="json")))  # which is YAML too
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    result = sae("export", config, "--export.folder=mine")
    assert (result.code, len(result.lines)) == (1, 1)
    assert "error: export.folder: mine is a relative path" in result.stderr
    assert not (tmp_path / "mine").exists()
    assert sae("export", config).code == 0
