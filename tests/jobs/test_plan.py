"""`sae plan`: its arithmetic against what was measured and what is really kept, its laws, and its command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import cli, lake
from sae.jobs.costs import Mesh, Rates, Sizes, memory, seconds, transfers
from sae.jobs.plan import Hardware, report_of
from sae.model import Autoencoder, TopK
from sae.subject import Subject
from sae.subject_shape import subject_shape
from sae.training import StepConfig, TrainStep
from tests.models import tiny_gpt2, tiny_llama
from tests.tiny_run import CORPUS, Lab, Result, sae

# benchmarks/results/2026-11-23.md: milliseconds a step without dead latents, and with a tenth of them dead.
MEASURED = {
    (16_384, 768, 32_768, 32): (4.14, 6.78),
    (16_384, 768, 131_072, 32): (10.19, 16.27),
    (8_192, 4_096, 131_072, 64): (31.70, 39.29),
}


@pytest.mark.parametrize("shape", MEASURED)
@pytest.mark.parametrize("dead", [0.0, 0.1])
def test_steps_take_about_what_was_measured(shape: tuple[int, int, int, int], dead: float) -> None:
    estimate = 1e3 * sum(seconds(Sizes(*shape, dead=dead), Mesh(), Rates()).values())
    assert estimate == pytest.approx(MEASURED[shape][dead > 0], rel=0.13)


def test_memory_is_about_what_was_measured() -> None:
    """2.02 GiB at most in a process that trains at the first shape, no latent dead, without subject and buffer.

    It held the pre-activations of all rows at a time, of which it now holds half.
    """
    needed = memory(Sizes(16_384, 768, 32_768, 32, dead=0.0), Mesh())
    assert (sum(needed.values()) + needed["pre-activations"]) / 2**30 == pytest.approx(2.02, rel=0.03)


@pytest.mark.parametrize("ema", [0.9, None])
def test_checkpoints_are_as_large_as_what_a_training_keeps(ema: float | None) -> None:
    autoencoder = Autoencoder(48, 20, TopK(4))
    step = TrainStep(autoencoder, StepConfig(ema_decay=ema))
    sizes = Sizes(64, 20, 48, 4, ema=ema is not None)
    counters = 256  # of steps and the like, whatever the shape

    def of(tensors: dict[str, torch.Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors.values())

    assert sizes.parameters == sum(p.numel() for p in autoencoder.parameters())
    assert sizes.model_bytes == of(autoencoder.tensors())
    assert 0 <= of(step.state_dict()) - sizes.state_bytes <= counters


@st.composite
def placed(draw: st.DrawFn) -> tuple[Sizes, Mesh]:
    mesh = Mesh(draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 3, 8, 64])))
    ranks = mesh.ranks
    sizes = Sizes(
        batch=ranks * draw(st.integers(1, 2000)),
        d_model=draw(st.integers(1, 5000)),
        n_latents=ranks * draw(st.integers(64, 4000)),
        k=draw(st.integers(1, 64)),
        dead=draw(st.floats(0, 1)),
        clip=draw(st.booleans()),
        ema=draw(st.booleans()),
        buffered=draw(st.integers(0, 10**6)),
    )
    return sizes, mesh


@given(placed())
def test_ranks_own_everything_once(case: tuple[Sizes, Mesh]) -> None:
    sizes, mesh = case
    needed = memory(sizes, mesh)
    for item, each in (("master weights", 4), ("Adam's moments", 8)):
        assert sizes.parameters * each - each * mesh.ranks <= needed[item] * mesh.ranks <= sizes.parameters * each
    assert ("gradients" in needed) == (mesh.dp > 1 or sizes.clip)
    assert ("moving average" in needed) == sizes.ema


@given(placed())
def test_ranks_send_only_to_others(case: tuple[Sizes, Mesh]) -> None:
    sizes, mesh = case
    sent = transfers(sizes, mesh)
    sizes_of = {"tp": mesh.tp, "dp": mesh.dp, "all": mesh.ranks}
    assert {one.over for one in sent} == {axis for axis, n in sizes_of.items() if n > 1}
    for one in sent:
        assert one.ranks == sizes_of[one.over]
        assert 0 < one.sent < 2 * one.size
    assert ("communication" in seconds(sizes, mesh, Rates())) == (mesh.ranks > 1)


@given(placed())
def test_more_ranks_need_no_more_memory_each(case: tuple[Sizes, Mesh]) -> None:
    sizes, mesh = case
    weights = ("master weights", "Adam's moments", "working copies")
    alone, shared = memory(sizes, Mesh()), memory(sizes, mesh)
    assert all(shared[item] <= alone[item] for item in weights)


def run_yaml(folder: Path, **autoencoder: Any) -> Path:
    shape = {"name": "a", "n_latents": 131_072, **autoencoder}
    values = {
        "lake": str(folder / "lake"),
        "subject": {"model": "not/there", "hook": "blocks.0.hook_resid_pre"},
        "corpus": {"name": "c", "paths": ["none"]},
        "autoencoder": shape,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    return path


def report(path: Path, *arguments: str) -> dict[str, Any]:
    result = sae("plan", path, "--json", *arguments)
    assert result.code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def choices(path: Path, *arguments: str) -> list[tuple[int, Any, Any]]:
    (training,) = report(path, "--d-model", "768", "--dead", "0", *arguments)["train"]
    return [(one["gpus"], one["tp"], one["dp"]) for one in training["choices"]]


def test_the_smallest_tp_that_fits_is_chosen_and_the_rest_is_dp(tmp_path: Path) -> None:
    path = run_yaml(tmp_path)
    assert choices(path) == [(1, 1, 1), (8, 1, 8), (64, 1, 64)]
    large = run_yaml(tmp_path, n_latents=2**22)
    assert choices(large) == [(1, None, None), (8, 1, 8), (64, 1, 64)]
    assert choices(large, "--gpu-gb", "40") == [(1, None, None), (8, 4, 2), (64, 2, 32)]
    assert choices(large, "--gpu-gb", "24", "--gpus-per-host", "4") == [(1, None, None), (8, None, None), (64, 4, 16)]


def test_why_a_mesh_was_chosen_is_told(tmp_path: Path) -> None:
    arguments = ("--d-model", "768", "--dead", "0", "--gpu-gb", "40", "--gpus", "1", "8", "3")
    (training,) = report(run_yaml(tmp_path, n_latents=2**22), *arguments)["train"]
    one, eight, three = (found["why"] for found in training["choices"])
    assert one == f"tp 1 needs {training['memory_bytes'] / 1e9:.1f} GB of 36"
    chosen = training["choices"][1]["step_seconds"]
    match = re.fullmatch(r"tp 2 needs ([\d.]+) GB of 36; tp 8 may take ([\d.]+) ms", eight)
    assert match
    assert float(match[1]) > 36
    assert float(match[2]) < 0.95e3 * chosen
    assert three == "3 does not divide n_latents 4194304"


def test_tables_and_json_tell_the_same(tmp_path: Path) -> None:
    path = run_yaml(tmp_path)
    arguments = ("--d-model", "768", "--cluster.dp", "2")
    (training,) = report(path, *arguments)["train"]
    summary, needed, sent, times, *_ = sae("plan", path, *arguments).stdout.split("\n\n")
    assert f"{training['parameters']:,}" in summary

    def row(table: str, name: str) -> list[str]:
        """The figures behind a name."""
        (line,) = (line for line in table.splitlines() if line.startswith(f"{name}  "))
        return line.removeprefix(name).split()

    for name, size in training["memory"].items():
        assert row(needed, name) == [f"{size / 1e9:,.3f}"]
    for one in training["transfers"]:
        figures = [one["size"] / 1e6, one["sent"] / 1e6]
        assert row(sent, one["what"])[-3:-1] == [f"{figure:,.1f}" for figure in figures]
    assert row(times, "tokens/s") == [f"{training['tokens_per_second']:,.0f}"]


def test_rates_are_heeded(tmp_path: Path) -> None:
    path = run_yaml(tmp_path)

    def times(*arguments: str) -> dict[str, float]:
        (training,) = report(path, "--d-model", "768", "--cluster.dp", "64", *arguments)["train"]
        found: dict[str, float] = training["seconds"]
        return found

    usual = times()
    assert times("--tflops", "325")["encoder product"] == pytest.approx(2 * usual["encoder product"])
    assert times("--network", "ethernet")["communication"] > 10 * usual["communication"]
    assert times("--network", "12.5") == times("--network", "ethernet")
    assert times("--link", "30")["communication"] > 5 * usual["communication"]


def test_each_autoencoder_of_a_sweep_is_planned(tmp_path: Path) -> None:
    path = run_yaml(tmp_path)
    values = json.loads(path.read_text())
    shape = values.pop("autoencoder")
    values["autoencoders"] = [shape, {**shape, "name": "b", "n_latents": 2 * shape["n_latents"]}]
    path.write_text(json.dumps(values))
    first, second = report(path, "--d-model", "768", "--cluster.dp", "2")["train"]
    assert [first["autoencoder"], second["autoencoder"]] == ["a", "b"]
    assert second["memory"]["master weights"] == pytest.approx(2 * first["memory"]["master weights"], rel=1e-4)
    assert first["rows"] == first["batch_tokens"], "its rank trains it alone, on all rows"
    assert [one["what"] for one in first["transfers"]] == ["rows of the batch"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--autoencoder.activation", "relu", "--d-model", "8"], "sae plan knows the costs of activation topk"),
        (["--autoencoder.tied", "true", "--d-model", "8"], "sae plan knows the costs of activation topk"),
        (["--cluster.tp", "3"], "does not divide n_latents"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(tmp_path: Path, overrides: list[str], expected: str) -> None:
    result = sae("plan", run_yaml(tmp_path), *overrides)
    assert result.code == 1
    (line,) = result.lines
    assert expected in line


@pytest.mark.parametrize(
    "arguments",
    [["--gpus", "0"], ["--dead", "1.5"], ["--gpu-gb", "-1"], ["--network", "pigeon"], ["--tflops", "nan"]],
)
def test_a_wrong_option_is_told(tmp_path: Path, arguments: list[str]) -> None:
    result: Result = sae("plan", run_yaml(tmp_path), *arguments)
    assert result.code == 2
    assert f"argument {arguments[0]}: got '{arguments[1]}'; expected" in result.lines[-1]


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_pre", "resid_post_mlp.0", "mlp_post_act.1", "resid_delta_attn.0"]
)
def test_the_width_is_that_of_the_booted_subject(make: Any, hook: str, tmp_path: Path) -> None:
    folder = str(make(tmp_path / "model"))
    subject = Subject.load(folder, hook, layers=2)
    assert subject_shape(folder, hook, 2, 64).d_model == subject.d_model


def test_the_subject_is_counted_without_its_weights(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", n_layer=4)
    subject = Subject.load(str(folder), "blocks.2.hook_resid_pre")
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    shape = subject_shape(str(folder), "blocks.2.hook_resid_pre", None, 64)
    assert shape.parameters == sum(p.numel() for p in subject.bridge.original_model.parameters())
    block = sum(p.numel() for p in subject.bridge.original_model.model.layers[0].parameters())
    assert shape.flops == 2 * (2 * block + 4 * 64 * 32), "two blocks run, and attention over 64 positions"
    fewer = subject_shape(str(folder), "blocks.2.hook_resid_pre", 2, 64)
    assert shape.parameters - fewer.parameters == 2 * block


def test_a_width_that_no_config_tells_is_asked_for(lab: Lab) -> None:
    result = lab.sae("plan", subject__hook="blocks.0.attn.hook_z")
    assert result.code == 1
    assert "give --d-model" in result.stderr


def test_a_plan_writes_nothing(lab: Lab, tmp_path: Path) -> None:
    there = lab.without_lake(tmp_path)
    assert there.done("plan").stdout.startswith("train tiny: d 32, n 64, k 4")
    assert list(tmp_path.iterdir()) == []


def test_the_corpus_is_counted_once_it_is_known(tokenized: Lab) -> None:
    corpora = lake.connect(str(tokenized.lake)).sql(f"select n_tokens from corpora where corpus = '{CORPUS}'")
    ((tokens,),) = corpora.fetchall()
    flag = f"--lake={tokenized.lake}"
    found = report(tokenized.config, flag)["lake"]
    assert (found["corpus_known"], found["tokens"]) == (True, tokens)
    assert f"for the corpus' {tokens:,} tokens" in sae("plan", tokenized.config, flag).stdout


def test_the_cache_of_activations_is_as_large_as_planned(tokenized: Lab, no_ray: None, tmp_path: Path) -> None:
    there = tokenized.copy(tmp_path)
    flags = (f"--lake={there.lake}", "--subject.masked_positions=[]", "--training.source=cached")
    (harvest,) = (step for step in report(there.config, *flags)["lake"]["steps"] if step["step"] == "harvest")
    planned = harvest["tables"]["activations"]
    there.done("harvest", subject__masked_positions=[])
    written = sum(path.stat().st_size for path in (there.lake / "activations").rglob("*.arrow"))
    framing = 4096 * planned["files"]  # schema, footer, alignment
    assert planned["files"] == len(list((there.lake / "activations").rglob("*.arrow")))
    assert 0 <= written - planned["bytes"] <= framing


def test_as_many_checkpoints_are_planned_as_a_training_commits(trained: Lab) -> None:
    (training,) = report(trained.config, f"--lake={trained.lake}")["train"]
    sets = [json.loads(path.read_text())["set"] for path in sorted((trained.lake / "_log").iterdir())]
    committed = [properties for properties in sets if "autoencoder/tiny" in properties]
    assert training["checkpoints"]["written"] == len(committed)
    last = committed[-1]["autoencoder/tiny"]
    assert last["tokens"] == training["tokens"]
    assert len(last["checkpoints"]) <= training["checkpoints"]["kept"]


@pytest.mark.parametrize("every", [1, 64, 100, 640, 6399, 6400, 10**9])
def test_the_last_step_commits_in_any_case(lab: Lab, every: int) -> None:
    """Against the rule of the training, step by step."""
    config = cli.load_config(str(lab.config), [("training.checkpoint_tokens", str(every))])
    planned = report_of(config, Hardware(8e10, Rates()), [])["train"][0]["checkpoints"]["written"]
    batch, n_steps = config.training.batch_tokens, config.training.tokens // config.training.batch_tokens
    due = [step * batch // every > (step - 1) * batch // every for step in range(1, n_steps + 1)]
    assert planned == sum(due) + (not due[-1])
