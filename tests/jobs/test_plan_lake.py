"""`sae plan` for the lake's steps: against a tiny real run, and against what larger ones took."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import cli, compact
from sae.jobs.costs import Rates
from sae.jobs.lake import Lake
from sae.jobs.lake_costs import Hosts, Sizes, Step, merged_rows, steps
from sae.jobs.log import sealed
from sae.jobs.spent import spent
from tests.in_process import harvest_all
from tests.no_ray import without_ray
from tests.tiny_run import CORPUS, NAME, Lab, sae

# SmolLM2-135M to block 15, contexts of 128, 32,768 latents: benchmarks/results/2026-11-23.md.
H200 = Sizes(
    tokens=26_481_197,
    contexts=276_884,
    width=128,
    kept=26_204_313,
    shards=7,
    runs=136,
    run_tokens=262_144,
    d_model=576,
    n_latents=32_768,
    k=32,
    examples=50,
    exported=32_768,
    file_rows=50_000_000,
    merged_at_once=63,
    task=800_000_000,
    subject=2 * 134_515_008,
    subject_flops=110_626_560,
    compiled=True,
    cached=False,
    by_token=False,
)
# 64 synthetic runs, and 13 of them, on two cores.
LAPTOP = Hosts(2, 0, Rates())
SYNTHETIC = replace(H200, contexts=262_144, width=64, kept=64 * 246_345, runs=64, d_model=1, subject_flops=0)


def step(name: str, sizes: Sizes, hosts: Hosts) -> Step:
    (found,) = (each for each in steps(sizes, hosts) if each.name == name)
    return found


@pytest.mark.parametrize(("compiled", "measured"), [(True, 1_581_661), (False, 763_080)])
def test_a_gpu_encodes_about_as_fast_as_was_measured(compiled: bool, measured: float) -> None:
    encode = step("encode", replace(H200, compiled=compiled), Hosts(16, 1, Rates()))
    assert encode.tables["latents"].rows == 838_538_016
    assert H200.tokens / encode.seconds == pytest.approx(measured, rel=0.05)
    assert step("encode", H200, Hosts(16, 4, Rates())).seconds < encode.seconds


def test_compaction_takes_about_what_was_measured() -> None:
    found = step("compact", SYNTHETIC, LAPTOP)
    assert found.tables["latents"].rows == pytest.approx(504_514_550, rel=1e-5)
    assert found.tables["latents"].files == 11
    assert found.seconds == pytest.approx(46.5, rel=0.15)
    assert found.memory == pytest.approx(1.83e9, rel=0.15)


def planned(lab: Lab, *arguments: str) -> dict[str, Any]:
    flags = (f"--lake={lab.lake}", f"--export.folder={lab.lake.parent / 'viewer'}")
    result = sae("plan", lab.config, "--json", *flags, *arguments)
    assert result.code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)["lake"]
    return found


def steps_of(lab: Lab, *arguments: str) -> dict[str, dict[str, Any]]:
    return {each["step"]: each for each in planned(lab, *arguments)["steps"]}


def test_a_copy_by_token_is_planned_and_told(done: Lab) -> None:
    done.done("compact", compact__by_token=True)
    compact = steps_of(done, "--compact.by_token", "true")["compact"]
    plan, really = (tables["latents_by_token"] for tables in (compact["tables"], compact["really"]["tables"]))
    assert (really["rows"], really["files"]) == (plan["rows"], plan["files"])
    assert "latents_by_token" not in steps_of(done)["compact"]["tables"]
    flags = (f"--lake={done.lake}", f"--export.folder={done.lake.parent / 'viewer'}")
    written = sae("plan", done.config, *flags).stdout.split("\n\n")[-2]
    (line,) = (line for line in written.splitlines() if "latents_by_token" in line)
    there = [f"{really['rows']:,}", f"{really['bytes'] / 1e6:,.3f}", f"{really['files']:,}"]
    assert line.split() == ["latents_by_token", *(cell for size in there for cell in ("-", size))]


@pytest.fixture(scope="module")
def all_done(finished: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run after all of the lake's steps but effects and explain; not to be changed."""
    there = finished.copy(tmp_path_factory.mktemp("done"))
    with without_ray():
        for name in ("compact", "aggregate", "export"):
            there.done(name)
    return there


@pytest.fixture
def done(all_done: Lab, no_ray: None, tmp_path: Path) -> Lab:
    shutil.copytree(all_done.lake.parent / "viewer", tmp_path / "viewer")
    return all_done.copy(tmp_path)


NOT_DONE = ("effects", "explain")
MOST = {"histograms", "top", "samples"}


def test_a_run_writes_what_was_planned(tokenized: Lab, done: Lab) -> None:
    before, after = steps_of(tokenized), steps_of(done)
    assert list(before) == ["tokenize", "encode", "compact", "aggregate", "effects", "explain", "export"]
    for name in NOT_DONE:
        assert after.pop(name)["really"] is None
    for name, step in after.items():
        assert step["tables"] == before[name]["tables"], "the plan is that of before"
        really = step["really"]["tables"]
        assert really.keys() == step["tables"].keys()
        for table, plan in step["tables"].items():
            assert really[table]["files"] == plan["files"]
            if table in MOST:
                assert 0 < really[table]["rows"] <= plan["rows"]
            else:
                assert really[table]["rows"] == plan["rows"]
            # Tiny files are footers for the most part.
            assert plan["bytes"] / 3 < really[table]["bytes"] < 3 * plan["bytes"], (name, table)


def test_what_steps_took_is_noted(done: Lab) -> None:
    for name, step in steps_of(done).items():
        assert name in NOT_DONE or 0 < step["really"]["seconds"] < 600


def test_tables_tell_what_json_tells(done: Lab) -> None:
    flags = (f"--lake={done.lake}", f"--export.folder={done.lake.parent / 'viewer'}", "--cores", "2")
    found = steps_of(done, "--cores", "2")
    *_, written, taken = sae("plan", done.config, *flags).stdout.split("\n\n")
    latents = found["encode"]["tables"]["latents"], found["encode"]["really"]["tables"]["latents"]
    (line,) = (line for line in written.splitlines() if line.startswith("encode"))
    assert line.split()[2:4] == [f"{each['rows']:,}" for each in latents]
    assert line.split()[4:6] == [f"{each['bytes'] / 1e6:,.3f}" for each in latents]
    (line,) = (line for line in taken.splitlines() if line.startswith("export"))
    assert line.split()[-2:] == [f"{found['export'][key]:,.1f}" for key in ("seconds",)] + [
        f"{found['export']['really']['seconds']:,.1f}"
    ]


def test_only_what_is_done_is_told(tokenized: Lab, finished: Lab) -> None:
    assert {name for name, each in steps_of(tokenized).items() if each["really"]} == {"tokenize"}
    assert {name for name, each in steps_of(finished).items() if each["really"]} == {"tokenize", "encode", "aggregate"}


def test_what_harvest_spent_is_told(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    cached = ("--training.source", "cached")
    assert steps_of(lab, *cached)["harvest"]["really"] is None
    harvest_all(lab)
    harvest = steps_of(lab, *cached)["harvest"]
    (plan,), (found,) = harvest["tables"].values(), harvest["really"]["tables"].values()
    assert (found["rows"], found["files"]) == (plan["rows"], plan["files"])
    assert plan["bytes"] / 3 < found["bytes"] < 3 * plan["bytes"]
    assert 0 < harvest["really"]["seconds"] < 600
    other = steps_of(lab, *cached, "--subject.hook", "blocks.0.hook_resid_pre")
    assert other["harvest"]["really"] is None, "they are the activations at another hook"
    nowhere = steps_of(lab, *cached, "--subject.model", "/nowhere", "--d-model", "32")
    assert nowhere["harvest"]["really"] is None


def test_an_export_of_other_latents_is_not_told(done: Lab) -> None:
    sae("drop", done.lake, "--latents", NAME, "--run", f"{CORPUS}/0")
    assert steps_of(done)["export"]["really"] is None


def test_a_run_that_was_dropped_and_made_again_counts_once(done: Lab) -> None:
    before = steps_of(done)["encode"]["really"]["tables"]["latents"]
    assert sae("drop", done.lake, "--latents", NAME, "--run", f"{CORPUS}/1").code == 0
    less = steps_of(done)["encode"]["really"]["tables"]["latents"]
    assert (less["files"], less["rows"] < before["rows"]) == (before["files"] - 1, True)
    done.done("encode")
    assert steps_of(done)["encode"]["really"]["tables"]["latents"] == before


def test_rows_are_merged_as_often_as_planned(trained: Lab, no_ray: None, tmp_path: Path) -> None:
    there = trained.copy(tmp_path)
    there.done("encode", encode__run_tokens=64)
    config = cli.load_config(str(there.config), [("compact.memory_mb", "100")])
    lake = Lake(str(there.lake))
    runs = [file.rows for file in lake.snapshot().select("latents")]
    before = lake.snapshot().version
    there.done("compact", compact__memory_mb=100)
    entries = [entry for entry in lake.log.entries(before + 1) if entry["operation"] == "compact"]
    written = sum(file["rows"] for entry in entries for file in entry["add"])
    assert len(entries) > 2
    assert written == merged_rows(runs, compact.sets_at_once(config)) > sum(runs)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=200), st.integers(2, 63))
def test_a_row_is_merged_a_number_of_times_that_grows_like_a_logarithm(sets: list[int], at_once: int) -> None:
    """Its set is at most eight times as large as the others together, so that it grows by an eighth at least."""
    rows = sum(sets)
    assert merged_rows(sets, at_once) <= rows * math.log(rows / min(sets)) / math.log(9 / 8) + 1e-6 * rows
    assert merged_rows(sets, 200) in (0, *(sum(sorted(sets)[:n]) for n in range(2, len(sets) + 1)))


def test_time_in_which_runs_overlap_counts_once(lab: Lab, tmp_path: Path) -> None:
    there = lab.without_lake(tmp_path)
    config = cli.load_config(str(there.config), [("lake", str(there.lake))])
    lake, now = Lake(str(there.lake), create=True), time.time()

    def commit(run: int, began: float) -> None:
        with lake.transaction("encode", f"encode/{NAME}/{CORPUS}/{run}", began) as transaction:
            transaction.write_with(
                "latents", "parquet", lambda path: Path(path).touch(), autoencoder=NAME, corpus=CORPUS
            )

    def seconds() -> float | None:
        return spent(lake, lake.snapshot(), config)["encode"].seconds

    commit(0, now - 100)
    commit(1, now - 90)
    assert seconds() == pytest.approx(100, abs=20)
    entry = lake.log.entry(1)
    assert entry is not None
    del entry["span"]
    lake.log.link(sealed({**entry, "version": 2, "unit": f"encode/{NAME}/{CORPUS}/2"}))
    assert seconds() is None, "an older sae has not noted it"


def test_options_are_heeded(tokenized: Lab) -> None:
    usual, slower = steps_of(tokenized), steps_of(tokenized, "--encode-gpus", "0", "--cores", "2")
    assert usual["encode"]["gpu_seconds"] > 0
    assert slower["encode"]["gpu_seconds"] == 0
    assert slower["encode"]["seconds"] == pytest.approx(slower["encode"]["core_seconds"] / 2)
    assert steps_of(tokenized, "--cluster.gpus_per_worker", "0")["encode"]["gpu_seconds"] == 0
    assert planned(tokenized, "--cluster.encode_actors", "3")["gpus"] == 3
    cached = steps_of(tokenized, "--training.source", "cached")
    assert cached["harvest"]["tables"]["activations"]["rows"] * 4 == cached["encode"]["tables"]["latents"]["rows"]
    assert steps_of(tokenized, "--export.atoms=[2,4]")["export"]["tables"]["json"]["files"] == 3


def test_tokens_are_taken_where_the_lake_has_none(lab: Lab, tokenized: Lab, tmp_path: Path) -> None:
    there = lab.without_lake(tmp_path)
    assert planned(there)["tokens"] == 1_000_000
    large = planned(there, "--tokens", "10000000000", "--encode.run_tokens", "262144")
    assert (large["corpus_known"], large["tokens"]) == (False, 10**10)
    assert planned(tokenized, "--tokens", "10")["tokens"] == planned(tokenized)["tokens"]


def test_a_subject_that_is_not_counted_is_told(tokenized: Lab) -> None:
    told = "; subject model not counted"
    assert told in sae("plan", tokenized.config, "--d-model", "32").stdout.split("\n\n")[-1]
    assert told not in sae("plan", tokenized.config).stdout


def test_what_was_made_of_latents_that_are_dropped_is_not_told(done: Lab) -> None:
    assert sae("drop", done.lake, "--latents", NAME).code == 0
    assert {name for name, each in steps_of(done).items() if each["really"]} == {"tokenize"}
    done.done("encode")
    assert {name for name, each in steps_of(done).items() if each["really"]} == {"tokenize", "encode"}


def test_each_autoencoder_has_its_steps(tokenized: Lab) -> None:
    two = [{"name": "a", "n_latents": 64, "k": 4}, {"name": "b", "n_latents": 128, "k": 8}]
    config = tokenized.lake.parent / "two.yaml"
    values = json.loads(json.dumps(cli.load_config(str(tokenized.config)).model_dump(mode="json")))
    config.write_text(json.dumps({**values, "autoencoder": two[0], "autoencoders": two, "lake": str(tokenized.lake)}))
    found = json.loads(sae("plan", config, "--json").stdout)["lake"]["steps"]
    assert [each["step"] for each in found].count("tokenize") == 1
    rows = {each["autoencoder"]: each["tables"]["latents"]["rows"] for each in found if each["step"] == "encode"}
    assert rows["b"] == 2 * rows["a"]
