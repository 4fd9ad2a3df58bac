"""Figures speak of the held-out text of that training, and are refreshed when they are asked of other tokens."""

import json
import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from sae.jobs import evaluate, storage
from sae.jobs.lake import Lake, connect
from sae.jobs.measure import Measured, _Measurement, measure
from sae.schemas import config
from sae.schemas.errors import ConfigError
from sae.schemas.tables import SCHEMAS
from tests.in_process import run_of, train
from tests.no_ray import without_ray
from tests.object_stores import serve
from tests.tiny_run import CORPUS, NAME, Lab, sae

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def long_documents(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run over documents that are longer than what is evaluated, trained for ten steps."""
    folder = tmp_path_factory.mktemp("long")
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(f"the quick brown fox paid {number} yen " * 60)
    there = lab.without_lake(folder)
    there.done("tokenize", corpus__paths=[str(folder / "*.txt")])
    train(there, training__tokens=640, training__validation=0.3)
    return there


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 8),
        ("training__validation", 0.5),
        ("training__dead_tokens", 10),
        ("subject__hook", "blocks.0.hook_resid_pre"),
        ("autoencoder__k", 8),
    ],
)
def test_other_settings_than_in_training_are_refused(key: str, value: Any, long_documents: Lab) -> None:
    before = long_documents.bytes()
    result = long_documents.sae("evaluate", **{"training__validation": 0.3, key: value})
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert f"error: {key.replace('__', '.')}: autoencoder tiny of" in result.stderr
    assert f"now it is {value}; give " in result.stderr
    assert long_documents.bytes() == before


def test_the_evaluated_tokens_are_of_several_documents(long_documents: Lab) -> None:
    working = _Measurement(run_of(long_documents, training__validation=0.3, evaluate__tokens=256))
    training, evaluated = (set(working._corpus.doc_id[rows].tolist()) for rows in (working._train, working._test))
    assert len(evaluated) > 1
    assert not training & evaluated


@pytest.mark.slow
def test_figures_follow_the_number_of_tokens(long_documents: Lab, one_ray: None, tmp_path: Path) -> None:
    lab = long_documents.copy(tmp_path)

    def figures(tokens: int) -> dict[str, float]:
        lab.done("evaluate", training__validation=0.3, evaluate__tokens=tokens)
        query = "select metric, value from metrics where phase = 'evaluate'"
        rows = connect(str(lab.lake)).sql(query).fetchall()
        found = dict(rows)
        assert len(found) == len(rows), "one row a metric"
        return found

    few = figures(64)
    with without_ray():
        more = figures(512)
        assert few != more
        assert figures(64) == few
    result = lab.done("evaluate", training__validation=0.3, evaluate__tokens=64)
    assert len(result.lines) == 1, "nothing is left to do"


@pytest.fixture(scope="module")
def labelled(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run over documents with a topic, of which a token tells, trained for twenty steps."""
    folder, draw = tmp_path_factory.mktemp("labelled"), random.Random(0)
    rows = []
    for number in range(120):
        topic = ("fox", "yen")[number % 2]
        words = [
            *draw.choices(["the", "quick", "brown", "paid", "naïve", "dog", "lazy", "owners", "of"], k=18),
            *[topic] * 6,
        ]
        more = {"rare": "one" if number < 3 else "other", "list": [1], "sparse": None if number % 2 else True}
        rows.append({"id": str(number), "text": " ".join(draw.sample(words, len(words))), "topic": topic, **more})
    (folder / "docs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {**yaml.safe_load(lab.config.read_text()), "lake": str(folder / "lake")}
    values["corpus"] |= {"paths": [str(folder / "docs.jsonl")], "id": "id"}
    values["training"] |= {"tokens": 1280, "validation": 0.3}
    values["evaluate"] |= {"ablations": 4}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    there = Lab(folder, folder / "lake")
    there.done("tokenize")
    train(there)
    return there


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker measures is measured in this process."""
    monkeypatch.setattr(evaluate, "_measured", measure)


def never(*_: Any) -> Measured:
    raise AssertionError("nothing is to be measured")


def figures(lab: Lab, name: str = NAME) -> dict[str, float]:
    query = f"select metric, value from metrics where phase = 'evaluate' and autoencoder = '{name}'"
    rows = connect(str(lab.lake)).sql(query).fetchall()
    found: dict[str, float] = dict(rows)
    assert len(found) == len(rows), "one row a metric"
    return found


def test_figures_and_distributions_and_a_report_are_made_once(
    labelled: Lab, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labelled.copy(tmp_path)
    labels = {"evaluate__labels": ["topic"]}
    shown = lab.done("evaluate", **labels)
    assert "loss recovered, against zeros" in shown.stderr
    found = figures(lab)
    assert all(math.isfinite(value) for value in found.values())
    assert found["probe_topic_chance"] == pytest.approx(math.log(2))
    assert found["probe_topic_k5"] < 0.8 * found["probe_topic_chance"]
    assert found["probe_topic_pca_k5"] < 0.8 * found["probe_topic_chance"]
    assert 0 < found["ablation_sparsity"] <= 1
    lake = connect(str(lab.lake))
    sums = dict(lake.sql("select distribution, sum(n) from distributions group by distribution").fetchall())
    assert sums["density"] == 64
    assert sums["max_act"] == 64 * (1 - found["silent_fraction"])
    assert sums["l0"] == found["tokens_evaluated"]

    report = lab.lake / "reports" / f"evaluation-{NAME}.html"
    page = ET.fromstring(report.read_text("utf-8"))
    cells = {"".join(row[0].itertext()): "".join(row[-1].itertext()) for row in page.iter("tr") if len(row) == 3}
    assert cells["KL(clean || reconstructed)"] == f"{found['kl_reconstructed']:.4f}"
    charts = {svg.attrib["aria-label"]: svg for svg in page.iter(f"{SVG}svg")}
    assert len(charts) == 6
    drawn = {title: [each.text or "" for each in chart.iter(f"{SVG}title")] for title, chart in charts.items()}
    for title, name in (("Density", "density"), ("Largest activations", "max_act"), ("Active latents", "l0")):
        rows = lake.sql(f"select n from distributions where distribution = '{name}' and upper > 0 order by bin")
        assert [int(told.split(": ")[1]) for told in drawn[title]] == [n for (n,) in rows.fetchall()]
    trained = lake.sql("select count(*) from metrics where metric = 'fvu' and phase in ('train', 'validation')")
    assert len(drawn["FVU in training"]) == trained.fetchall()[0][0] + 2  # a curve has its name besides
    (of_all,) = drawn["FVU against L0, all evaluated autoencoders"]
    assert of_all.startswith(f"{NAME}: 4, {found['fvu']:.4g}")

    monkeypatch.setattr(evaluate, "_measured", never)
    assert len(lab.done("evaluate", **labels).lines) == 1
    report.unlink()
    lab.done("evaluate", **labels)
    assert report.exists()
    other = tmp_path / "of {name}.html"
    lab.done("evaluate", **labels, evaluate__report=str(other))
    assert (tmp_path / f"of {NAME}.html").exists()


def test_explanations_that_came_since_are_added(
    labelled: Lab, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labelled.copy(tmp_path)
    lab.done("evaluate")
    found = figures(lab)
    monkeypatch.setattr(evaluate, "_measured", never)
    explained = {"recall": [0.25, None], "precision": [1.0, 0.5], "correlation": [0.5, 0.25], "atom": [0, 1]}
    with Lake(str(lab.lake)).transaction("test") as transaction:
        transaction.write("explanations", _rows("explanations", explained, 2), autoencoder=NAME)
    lab.done("evaluate")
    of_atoms = {"n2g_recall": 0.25, "n2g_precision": 0.75, "n2g_correlation": 0.375, "n2g_atoms": 2.0}
    assert figures(lab) == {**found, **of_atoms}
    assert len(lab.done("evaluate").lines) == 1


def _rows(table: str, values: dict[str, Any], n: int) -> pa.Table:
    """Rows of a table; what is not given is zero or empty."""
    columns = []
    for field in SCHEMAS[table]:
        nothing: Any = [] if pa.types.is_list(field.type) else "" if field.type == pa.string() else 0
        columns.append(pa.array(values.get(field.name, [nothing] * n), field.type))
    return pa.table(columns, schema=SCHEMAS[table])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["colour"], "evaluate.labels: no document of corpus texts has a value in a column 'colour'"),
        (["rare"], "evaluate.labels: too few labelled documents: of 120 with a value in column 'rare'"),
        (["sparse"], "evaluate.labels: too few labelled documents: of 60 with a value in column 'sparse'"),
        (["topic", "list"], "docs.jsonl:1: column 'list' of evaluate.labels is of type list; expected"),
    ],
)
def test_labels_that_can_not_be_are_told_in_one_line(labels: list[str], expected: str, labelled: Lab) -> None:
    before = labelled.bytes()
    result = labelled.sae("evaluate", evaluate__labels=labels)
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert expected in result.stderr
    assert labelled.bytes() == before


def test_labels_of_files_that_have_changed_are_refused(labelled: Lab, tmp_path: Path) -> None:
    lab, files = labelled.copy(tmp_path), labelled.folder / "docs.jsonl"
    before = files.read_bytes()
    given = {"evaluate__labels": ["topic"]}
    try:
        files.write_bytes(before + b'{"id": "120", "text": "more", "topic": "fox"}\n')
        longer = lab.sae("evaluate", **given)
        files.write_bytes(before.replace(b'"id": "7"', b'"id": "8"'))
        other = lab.sae("evaluate", **given)
    finally:
        files.write_bytes(before)
    for result in (longer, other):
        assert (result.code, len(result.lines)) == (1, 1), result.stderr
        assert "evaluate.labels: labels are read from the files of corpus texts again, and these have" in result.stderr


def test_evaluated_autoencoders_are_compared(labelled: Lab, here: None, tmp_path: Path) -> None:
    lab = labelled.copy(tmp_path)
    wide = {"autoencoder__name": "wide", "autoencoder__k": 8}
    train(lab, **wide)
    lab.done("evaluate")

    def compared(*names: str) -> Any:
        return sae("evaluate", lab.config, "--compare", *names, f"--lake={lab.lake}")

    for names, expected in (
        ((NAME, "wide"), "--compare: autoencoder wide is not evaluated on corpus texts (evaluated are: tiny); run sae"),
        ((NAME, "none"), "--compare: autoencoder none is not in this lake (it has: tiny, wide)"),
    ):
        result = compared(*names)
        assert (result.code, len(result.lines), result.stdout) == (1, 1, ""), result.stderr
        assert f"error: {expected}" in result.stderr
    lab.done("evaluate", **wide)
    result = compared("wide", NAME)
    assert result.code == 0
    (line,) = (line for line in result.stdout.splitlines() if "FVU: squared error" in line)
    expected_values = [f"{figures(lab, name)['fvu']:.4f}" for name in ("wide", NAME)]
    assert [cell.strip() for cell in line.split("│")[3:5]] == expected_values
    page = ET.fromstring((lab.lake / "reports" / "comparison.html").read_text("utf-8"))
    heads = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr") if row[0].tag == "th"]
    assert ["figure", "unit", "wide", NAME] in heads
    assert len(list(page.iter(f"{SVG}svg"))) == 3 + 2 * 3
    gone = sae("drop", lab.lake, "--autoencoder", "wide")
    assert gone.code == 0
    assert not Lake(str(lab.lake)).snapshot().select("distributions", autoencoder="wide")
    assert Lake(str(lab.lake)).snapshot().select("distributions", corpus=CORPUS)


def test_a_lake_in_an_object_store_has_its_report_there(labelled: Lab, here: None) -> None:
    with serve("s3") as put:
        for name, data in labelled.bytes().items():
            put(f"evaluated/{name}", data)
        shown = labelled.done("evaluate", lake="s3://bucket/evaluated")
        path = f"s3://bucket/evaluated/reports/evaluation-{NAME}.html"
        assert shown.lines[-1] == f"evaluate: the report is {path}"
        page = ET.fromstring(storage.read_bytes(path).decode())
    assert len(list(page.iter(f"{SVG}svg"))) == 6


def test_several_autoencoders_need_several_reports(labelled: Lab) -> None:
    values = yaml.safe_load(labelled.config.read_text())
    one = values.pop("autoencoder")
    values |= {"autoencoders": [one, {**one, "name": "second"}], "evaluate": {"report": "report.html"}}
    with pytest.raises(ConfigError, match=r"evaluate.report is report.html, one file for 2 .*; put \{name\} in it"):
        config.parse(json.dumps(values))
    values["evaluate"]["report"] = "{name}.html"
    config.parse(json.dumps(values))
