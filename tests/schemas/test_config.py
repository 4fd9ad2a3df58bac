"""A config is validated whole, and each fault names its key, the value given and what is allowed."""

import re
from typing import Any

import pytest
import yaml

from sae.schemas.config import Run, parse
from sae.schemas.errors import ConfigError

GOOD: dict[str, Any] = {
    "lake": "./lake",
    "subject": {"model": "gpt2", "hook": "blocks.8.hook_resid_post"},
    "corpus": {"name": "texts", "paths": ["texts/*.txt"]},
    "autoencoder": {"name": "demo", "n_latents": 64},
}


def parse_with(*overrides: tuple[str, str], text: str | None = None) -> Run:
    return parse(text if text is not None else yaml.safe_dump(GOOD), overrides, "run.yaml")


def fault(*overrides: tuple[str, str], text: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_with(*overrides, text=text)
    return str(caught.value)


def test_defaults_fill_what_is_not_given() -> None:
    run = parse_with()
    assert run.training.source == "live"
    assert run.autoencoder.k == 32
    assert run.encode.bin_width == 0.2


def test_overrides_are_read_as_yaml() -> None:
    run = parse_with(
        ("training.lr", "3e-4"), ("subject.masked_positions", "[0, 1]"), ("corpus.id", "title"), ("seed", "3")
    )
    assert run.training.lr == 3e-4
    assert run.subject.masked_positions == (0, 1)
    assert run.corpus.id == "title"
    assert run.seed == 3


def test_a_config_is_not_changed_after_validation() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_with().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("autoencoder.n_latents", "0", ["got 0", "greater than or equal to 1"]),
        ("autoencoder.n_latents", "many", ["got 'many'", "valid integer"]),
        ("autoencoder.activation", "gelu", ["got 'gelu'", "'topk', 'batchtopk'"]),
        ("autoencoder.name", "a/b", ["got 'a/b'", "pattern"]),
        ("subject.dtype", "int8", ["got 'int8'", "'float32', 'bfloat16' or 'float16'"]),
        ("subject.hook", "''", ["got ''", "at least 1 character"]),
        ("corpus.paths", "[]", ["got []", "at least 1 item"]),
        ("corpus.context_length", "1", ["got 1", "greater than or equal to 2"]),
        ("corpus.on_bad_row", "ignore", ["got 'ignore'", "'stop' or 'skip'"]),
        ("training.lr", "0", ["got 0", "greater than 0"]),
        ("training.lr", "nan", ["got 'nan'", "finite number"]),
        ("training.ema", "1", ["got 1", "less than 1"]),
        ("training.source", "disk", ["got 'disk'", "'live' or 'cached'"]),
        ("training.log_to", "[mlflow]", ["got 'mlflow'", "'tensorboard' or 'wandb'"]),
        ("encode.bin_width", "-1", ["got -1", "greater than 0"]),
        ("encode.examples", "1001", ["got 1001", "less than or equal to 1000"]),
        ("cluster.encode_actors", "0", ["got 0", "greater than or equal to 1"]),
        ("cluster.tp", "0", ["got 0", "greater than or equal to 1"]),
        ("seed", "-1", ["got -1", "greater than or equal to 0"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(key: str, value: str, expected: list[str]) -> None:
    message = fault((key, value))
    assert "\n" not in message
    assert key in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf"])
@pytest.mark.parametrize("key", ["training.lr", "encode.bin_width", "training.auxk_coef", "training.clip_norm"])
def test_numbers_are_finite(key: str, value: str) -> None:
    assert f"run.yaml: {key}: got" in fault((key, value))


def test_an_unknown_key_gets_the_nearest_and_the_allowed_ones() -> None:
    message = fault(("training.batch_token", "64"))
    assert message.startswith("run.yaml: training.batch_token: unknown key; did you mean batch_tokens? allowed: ")
    assert "warmup_tokens" in message
    assert "unknown key; did you mean training? allowed: lake, seed" in fault(("trainig.tokens", "64"))


def test_a_missing_key_is_named() -> None:
    without = {section: value for section, value in GOOD.items() if section != "subject"}
    assert fault(text=yaml.safe_dump(without)) == "run.yaml: subject: missing; it must be given"
    without = {**GOOD, "autoencoder": {"name": "demo"}}
    assert fault(text=yaml.safe_dump(without)) == "run.yaml: autoencoder.n_latents: missing; it must be given"


def test_all_faults_are_told_at_once_a_line_each() -> None:
    lines = fault(("seed", "-1"), ("training.lr", "0"), ("lakes", "x")).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("run.yaml: ") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"autoencoder.k": "65"}, ["k is 65", "n_latents 64", "choose k <= n_latents"]),
        ({"subject.masked_positions": "[0, 1]", "corpus.context_length": "2"}, ["masked_positions [0, 1]", "2"]),
        ({"training.l1_coef": "1"}, ["training.l1_coef", "relu", "must be 0"]),
        ({"training.l0_coef": "1"}, ["training.l0_coef", "jumprelu", "topk", "must be 0"]),
        ({"autoencoder.activation": "groupmax", "autoencoder.k": "7"}, ["k is 7", "n_latents 64", "groupmax"]),
        ({"autoencoder.prefixes": "[8, 64]"}, ["prefixes are [8, 64]", "ascending", "below n_latents, 64"]),
        ({"training.tokens": "10"}, ["batch_tokens is 131072", "training.tokens 10"]),
        (
            {"training.schedule": "cosine", "training.decay_fraction": "0.2"},
            ["training.decay_fraction", "schedule constant", "cosine", "must be 0"],
        ),
    ],
)
def test_impossible_combinations_are_told(overrides: dict[str, str], expected: list[str]) -> None:
    message = fault(*overrides.items())
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lake: [", "run.yaml: not valid YAML: .*line"),
        ("", "run.yaml: expected sections such as 'subject:', got null"),
        ("- lake", "run.yaml: expected sections such as 'subject:', got \\['lake'\\]"),
        ("lake: x\nsubject: gpt2", "run.yaml: subject: got 'gpt2'; "),
    ],
)
def test_what_is_no_config_is_told_in_one_line(text: str, expected: str) -> None:
    lines = fault(text=text).splitlines()
    assert re.match(expected, lines[0])


@pytest.mark.parametrize("key", ["seed.x", "training.lr.y.z"])
def test_an_override_below_a_value_is_told(key: str) -> None:
    assert "is a single value, not a section" in fault(("seed", "1"), ("training.lr", "1"), (key, "2"))


def test_an_override_that_is_no_yaml_is_told() -> None:
    assert fault(("corpus.id", "[")) == "--corpus.id: '[' is not a valid YAML value; quote it"


def several(*shapes: dict[str, Any]) -> str:
    rest = {key: value for key, value in GOOD.items() if key != "autoencoder"}
    return yaml.safe_dump({**rest, "autoencoders": list(shapes)})


def test_several_autoencoders_are_one_run_each() -> None:
    shapes = {"name": "small", "n_latents": 64, "k": 4}, {"name": "large", "n_latents": 128, "k": 8}
    run = parse_with(text=several(*shapes))
    assert [(one.autoencoder.name, one.autoencoder.n_latents, one.autoencoders) for one in run.each()] == [
        ("small", 64, ()),
        ("large", 128, ()),
    ]
    assert [one.autoencoder for one in parse_with().each()] == [parse_with().autoencoder]


def test_several_autoencoders_that_cannot_be_told_apart_are_refused() -> None:
    shape = {"name": "small", "n_latents": 64, "k": 4}
    assert "the names small, small are not all different" in fault(text=several(shape, shape))
    both = yaml.safe_dump({**GOOD, "autoencoders": [shape]})
    assert "autoencoder and autoencoders are both given" in fault(text=both)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (
            [{"name": "a", "n_latent": 64}],
            ["0.n_latents: missing; it must", "0.n_latent: unknown key; did you mean n_la"],
        ),
        (
            [{"name": "a", "n_latents": 64}, {"name": "b", "n_latents": 0}],
            ["1.n_latents: got 0; expected greater than"],
        ),
        ([{"name": "a", "n_latents": 8, "k": 9}], ["0: k is 9, more than n_latents 8"]),
        ([3], ["0: got 3; expected a valid dictionary"]),
        ({"name": "a"}, [": got {'name': 'a'}; expected a valid list"]),
        ([], [": got []; list should have at least 1 item"]),
    ],
)
def test_a_fault_of_several_autoencoders_is_told_once(shapes: Any, expected: list[str]) -> None:
    rest = {key: value for key, value in GOOD.items() if key != "autoencoder"}
    lines = fault(text=yaml.safe_dump({**rest, "autoencoders": shapes})).splitlines()
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"run.yaml: autoencoders{'' if part.startswith(':') else '.'}{part}")


def test_any_number_of_workers_serves_several_autoencoders() -> None:
    shapes = {"name": "small", "n_latents": 64, "k": 4}, {"name": "large", "n_latents": 128, "k": 8}
    assert parse_with(("cluster.dp", "3"), ("training.batch_tokens", "96"), text=several(*shapes)).cluster.dp == 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"cluster.tp": "3", "training.batch_tokens": "96"},
            "cluster.tp 3 times cluster.dp 1 does not divide n_latents",
        ),
        (
            {"cluster.dp": "2", "training.batch_tokens": "97"},
            "training.batch_tokens: 97 is not divisible by cluster.tp",
        ),
        ({"training.lanes": "5", "training.batch_tokens": "64"}, "64 is not divisible by training.lanes, 5"),
        ({"training.multi_topk_coef": "0.1", "autoencoder.activation": "relu"}, "training.multi_topk_coef is for"),
    ],
)
def test_a_mesh_that_does_not_divide_the_work_is_refused(overrides: dict[str, str], expected: str) -> None:
    assert expected in fault(*overrides.items())


def test_a_config_that_is_written_out_whole_is_read_as_it_was() -> None:
    for run in (parse_with(), parse_with(text=several({"name": "small", "n_latents": 64, "k": 4}))):
        assert parse_with(text=yaml.safe_dump(run.model_dump(mode="json"))) == run
