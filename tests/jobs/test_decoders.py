"""The table `decoders`: the directions of the weights that encoded, as rows, through every change of the lake."""

from contextlib import AbstractContextManager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch

from sae.jobs import aggregate, checkpoints, decoders, formats
from sae.jobs.lake import DataFile, Lake, connect
from sae.model import Autoencoder
from sae.schemas.tables import DECODERS
from sae.sharded import part_of
from tests.lakes import N_LATENTS, NAME, Small, encode, small_lake, train
from tests.tiny_run import Lab, sae


def directions(lake: str, version: int | None = None) -> np.ndarray:
    """[n, d], in order of the atoms."""
    rows = connect(lake, version).execute("select atom, direction from decoders order by atom").fetchall()
    assert [atom for atom, _ in rows] == list(range(len(rows)))
    return np.array([direction for _, direction in rows], np.float32)


def unit_rows(autoencoder: Autoencoder) -> np.ndarray:
    rows = np.asarray(autoencoder.decoder_rows.detach())
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return small_lake(tmp_path / "lake")


@pytest.mark.parametrize("weights", ["average", "plain"])
def test_rows_are_the_unit_norm_decoder_that_encoded(
    trained: Lab, no_ray: None, tmp_path: Path, weights: checkpoints.Weights
) -> None:
    lab = trained.copy(tmp_path)
    lab.done("encode", encode__weights=weights)
    lab.done("aggregate")
    plain, average = (unit_rows(checkpoints.load(Lake(str(lab.lake)), "tiny", kind)) for kind in ("plain", "average"))
    assert not np.allclose(plain, average, atol=1e-4)
    # One division in float32 apart.
    np.testing.assert_allclose(
        directions(str(lab.lake)), {"plain": plain, "average": average}[weights], rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(("file_rows", "group_rows"), [(3, 2), (8, 8), (1, 1)])
def test_files_are_ranges_of_atoms(
    small: Small, monkeypatch: pytest.MonkeyPatch, file_rows: int, group_rows: int
) -> None:
    whole, lake = directions(small.config.lake), small.lake
    monkeypatch.setattr(decoders, "_FILE_BYTES", file_rows * whole[0].nbytes)
    monkeypatch.setattr(decoders, "_GROUP_BYTES", group_rows * whole[0].nbytes)
    with lake.transaction("forget") as transaction:
        transaction.set(f"decoders/{NAME}", None)
    # From an object store each time is a download.
    opened: list[str] = []
    local = Lake.local

    def noted(lake: Lake, file: DataFile) -> AbstractContextManager[str]:
        opened.append(file.table)
        return local(lake, file)

    monkeypatch.setattr(Lake, "local", noted)
    aggregate.run(small.config)
    assert opened == ["checkpoints"]
    files = sorted(file.atoms for file in lake.snapshot().select("decoders") if file.atoms)
    assert files == [(first, min(first + file_rows, N_LATENTS) - 1) for first in range(0, N_LATENTS, file_rows)]
    np.testing.assert_array_equal(directions(small.config.lake), whole)


def test_a_tied_autoencoder_has_its_encoder(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    tied = Autoencoder(N_LATENTS, 4, tied=True)
    tensors = {key: value for key, value in tied.state_dict().items() if isinstance(value, torch.Tensor)}
    with small.lake.transaction("train") as transaction:
        state = transaction.base.properties[f"autoencoder/{NAME}"]
        shard = checkpoints.write_tensors(transaction, "checkpoints", NAME, tensors, [range(N_LATENTS)])
        checkpoint = {**state["checkpoints"][0], "model": [shard]}
        transaction.set(f"autoencoder/{NAME}", {**state, "config": tied.config(), "checkpoints": [checkpoint]})
    _encode_again(small)
    np.testing.assert_allclose(directions(small.config.lake), unit_rows(tied), rtol=0, atol=1e-7)


def test_shards_of_several_ranks_are_one_table(small: Small) -> None:
    autoencoder = Autoencoder(N_LATENTS, 4)
    tensors = {key: value for key, value in autoencoder.state_dict().items() if isinstance(value, torch.Tensor)}
    held = [[range(2), range(5, 8)], [range(2, 5)]]
    with small.lake.transaction("train") as transaction:
        state = transaction.base.properties[f"autoencoder/{NAME}"]
        shards = [
            checkpoints.write_tensors(transaction, "checkpoints", NAME, part_of(tensors, latents), latents)
            for latents in held
        ]
        checkpoint = {**state["checkpoints"][0], "model": shards}
        transaction.set(f"autoencoder/{NAME}", {**state, "checkpoints": [checkpoint]})
    _encode_again(small)
    np.testing.assert_allclose(directions(small.config.lake), unit_rows(autoencoder), rtol=0, atol=1e-7)


def test_every_version_has_the_directions_of_then(small: Small) -> None:
    first, before = small.lake.snapshot().version, directions(small.config.lake)
    train(small.lake, small.config, seed=1)
    np.testing.assert_array_equal(directions(small.config.lake), before)
    _encode_again(small)
    assert not np.allclose(directions(small.config.lake), before)
    np.testing.assert_array_equal(directions(small.config.lake, first), before)
    assert directions(small.config.lake, 1).size == 0  # tokenized and trained, not encoded


def _encode_again(small: Small) -> None:
    result = sae("drop", small.config.lake, "--latents", NAME)
    assert result.code == 0, result.stderr
    assert directions(small.config.lake).size == 0
    for run in range(3):
        encode(small, run)
    aggregate.run(small.config)


def test_they_are_written_once(small: Small) -> None:
    version = small.lake.snapshot().version
    aggregate.run(small.config)
    assert small.lake.snapshot().version == version


def test_weights_that_are_no_longer_kept_are_told(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    with small.lake.transaction("forget") as transaction:
        transaction.set(f"decoders/{NAME}", None)
    train(small.lake, small.config, seed=1)
    version = small.lake.snapshot().version
    aggregate.run(small.config)
    assert "the weights that encoded it" in capsys.readouterr().err
    assert small.lake.snapshot().version == version


def test_weights_take_less_than_their_four_bytes(tmp_path: Path) -> None:
    rows = torch.nn.functional.normalize(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    table = pa.table({"atom": range(len(rows)), "direction": rows.tolist()}, schema=DECODERS)
    assert formats.write("decoders", [table], str(tmp_path / "rows.parquet")) == len(rows)
    assert (tmp_path / "rows.parquet").stat().st_size < 0.9 * rows.nbytes
    found = duckdb.execute(f"select direction from '{tmp_path}/rows.parquet' order by atom").fetchall()
    np.testing.assert_array_equal(np.array(found, np.float32)[:, 0], rows)
