"""docs/steps and docs/format.md: their commands run on a tiny lake, and print what is shown; keys, tables, links hold.

All of it is played once, page by page in the order of the steps; then each test looks at what came of it.
"""

import ast
import contextlib
import hashlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import yaml
from safetensors.numpy import load_file

from sae.jobs import checkpoints, cli
from sae.jobs.lake import Lake, connect
from sae.schemas import config
from sae.schemas.config import Run
from sae.schemas.tables import SCHEMAS
from sae.statistics import priority
from tests import format_page
from tests.models import tiny_gpt2
from tests.no_ray import without_ray
from tests.pages import Page, code
from tests.tiny_run import sae, write_texts

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
INDEX: Final = Page(DOCS / "steps" / "README.md")
STEPS: Final = {step: Page(DOCS / "steps" / f"{step}.md") for step in cli.STEPS}
FORMAT: Final = Page(DOCS / "format.md")
# The index asks about a lake in which all is done.
PAGES: Final = (*STEPS.values(), INDEX, FORMAT)
EVERY_PAGE: Final = [Page(path) for path in sorted(DOCS.rglob("*.md"))]
FOLDER: Final = "/data"
ELSEWHERE: Final = re.compile(r"# needs a (cluster|browser)")
# Under which name a step commits what is not called as the step.
OPERATIONS: Final = {"aggregate": {"decoders"}, "compact": {"by_token"}, "effects": {"logits", "neighbours"}}
SECTIONS: Final = (
    "Reads and writes", "Commands", "Keys", "What it costs", "Interrupted, again, out of order", "When it fails",
)  # fmt: skip


class Script(NamedTuple):
    """A bash block, and what the page shows behind it."""

    page: Page
    number: int
    commands: list[str]
    shown: str | None

    @property
    def here(self) -> list[str]:
        return [line for line in self.commands if not ELSEWHERE.search(line)]


class Done(NamedTuple):
    """What a command gave."""

    command: str
    code: int
    printed: str


class Played(NamedTuple):
    """The lake's folder, what each script gave, and which versions a page's commands made."""

    folder: Path
    done: dict[tuple[str, int], list[Done]]
    versions: dict[str, range]

    @property
    def lake(self) -> Lake:
        return Lake(str(self.folder / "lake"))


def scripts(page: Page) -> list[Script]:
    found: list[Script] = []
    blocks = page.blocks()
    for at, block in enumerate(blocks):
        if block.language == "bash":
            after = blocks[at + 1] if at + 1 < len(blocks) else None
            shown = after.text if after is not None and after.language == "text" else None
            found.append(Script(page, len(found), block.lines, shown))
    return found


SCRIPTS: Final = [script for page in PAGES for script in scripts(page)]


def named(script: Script) -> str:
    return f"{script.page.path.stem}-{script.number}"


def run_yaml() -> str:
    (text,) = INDEX.of("yaml")
    return text


def play(command: str, folder: Path) -> Done:
    """Runs a command in the folder; what it prints is what it would print in /data."""
    there = command.replace(f"{FOLDER}/", f"{folder}/")
    words = shlex.split(there, comments=True)
    if words[0] == "sae":
        result = sae(*words[1:])
        status, printed = result.code, result.stdout + result.stderr
    else:
        ran = subprocess.run(["bash", "-c", there], capture_output=True, text=True)
        status, printed = ran.returncode, ran.stdout + ran.stderr
    return Done(command, status, printed.replace(str(folder), FOLDER))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("steps")
    tiny_gpt2(folder / "tiny-gpt2", n_layer=2, d=32, n_ctx=64)
    write_texts(folder / "texts")
    (folder / "run.yaml").write_text(run_yaml().replace(f"{FOLDER}/", f"{folder}/"))
    played = Played(folder, {}, {})
    with contextlib.chdir(folder), without_ray():
        for page in PAGES:
            before = _versions(folder)
            for script in scripts(page):
                played.done[page.path.stem, script.number] = [play(line, folder) for line in script.here]
            played.versions[page.path.stem] = range(before, _versions(folder))
        yield played


def _versions(folder: Path) -> int:
    """How many versions the lake has."""
    return len(Lake(str(folder / "lake"), create=True).log.versions())


def words(text: str) -> str:
    return " ".join(text.split())


def expected(shown: str) -> str:
    """A pattern for what is shown, in which dots stand for anything."""
    return ".*?".join(re.escape(part) for part in re.split(r" ?\.\.\. ?", words(shown)))


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_commands_print_what_is_shown(played: Played, script: Script) -> None:
    done = played.done[script.page.path.stem, script.number]
    printed = words(" ".join(each.printed for each in done))
    for each in done:
        assert (each.code != 0) == ("error: " in each.printed), each
    assert script.shown is not None or "error: " not in printed, printed
    if script.shown is not None:
        assert re.fullmatch(expected(script.shown), printed), printed


@pytest.mark.parametrize(
    "line", [line for script in SCRIPTS for line in script.commands if ELSEWHERE.search(line)], ids=str
)
def test_commands_for_elsewhere_parse(line: str) -> None:
    program, *given = shlex.split(line, comments=True)
    if program == "python":
        flag, module, path = given
        assert (flag, module.removeprefix("sae.jobs."), path) == ("-m", "encode", "run.yaml")
        return
    assert program == "sae"
    parsed, overrides = cli._parser().parse_known_args(given)
    assert hasattr(parsed, "command")
    config.parse(run_yaml(), cli._pairs(overrides))


@pytest.mark.parametrize("given", [words for page in EVERY_PAGE for words in page.words("sae")], ids=" ".join)
def test_commands_of_every_page_parse(given: list[str]) -> None:
    parsed, overrides = cli._parser().parse_known_args(given)
    assert hasattr(parsed, "command")
    assert hasattr(parsed, "config") or not overrides
    cli._pairs(overrides)


def test_commands_about_exports_do_what_they_say(played: Played) -> None:
    """But for those that serve, of which tests/jobs/test_view.py is."""
    given = [words for words in Page(DOCS / "exports.md").words("sae") if words[0] != "view"]
    assert {words[0] for words in given} == {"export", "validate"}
    with contextlib.chdir(played.folder), without_ray():
        assert [sae(*words).code for words in given] == [0] * len(given)


@pytest.mark.parametrize(
    ("page", "query"), [(page, query) for page in PAGES for query in page.of("sql")], ids=lambda each: ""
)
def test_sql_answers(played: Played, page: Page, query: str) -> None:
    assert connect(played.lake.path).execute(query).fetchall()


def keys(page: Page) -> list[tuple[str, str]]:
    """Every key with its default, as the page has them."""
    rows = (row for row in page.rows() if len(row) == 3 and re.fullmatch(r"`[a-z_.]+`", row[0]))
    return [(row[0].strip("`"), row[1].strip("`")) for row in rows]


def field(key: str) -> Any:
    """A key of the config; raises KeyError where there is none."""
    section, _, name = key.rpartition(".")
    fields = Run.model_fields[section].annotation.model_fields if section else Run.model_fields  # type: ignore[union-attr]
    return fields[name]


@pytest.mark.parametrize(
    ("key", "given"), sorted({each for page in STEPS.values() for each in keys(page)}), ids=lambda each: str(each)
)
def test_defaults_are_those_of_the_config(key: str, given: str) -> None:
    found = field(key)
    if found.is_required():
        assert given == "required"
        return
    default = found.get_default()
    assert yaml.safe_load(given) == (list(default) if isinstance(default, tuple) else default)
    assert type(yaml.safe_load(given)) is type(list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.path.stem)
def test_keys_that_are_named_exist(page: Page) -> None:
    sections = [name for name in Run.model_fields if hasattr(Run.model_fields[name].annotation, "model_fields")]
    text = re.sub(r"```.*?```", "", page.text, flags=re.DOTALL)
    for key in re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_0-9]+)", text):
        assert key == "cluster.yaml" or field(key)


@pytest.mark.parametrize("step", STEPS)
def test_a_page_has_all_sections_and_its_one_sentence(step: str) -> None:
    page = STEPS[step]
    assert re.findall(r"^## (.*)$", page.text, re.MULTILINE) == list(SECTIONS)
    title, sentence = page.text.split("\n\n")[:2]
    assert title == f"# sae {step}"
    assert sentence.replace("training.", "").index(".") == len(sentence.replace("training.", "")) - 1
    assert f"sae {step} run.yaml" in page.section("Commands")


def pattern(name: str) -> re.Pattern[str]:
    """Of what is called as the page has it, in which words in capitals stand for names."""
    return re.compile(re.sub(r"[A-Z]+", "[^/]+", re.escape(name)))


def matching(names: list[str], given: list[str]) -> set[str | None]:
    """For each name the pattern that it has."""
    return {next((one for one in given if pattern(one).fullmatch(name)), None) for name in names}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_writes_what_its_page_says(played: Played, step: str) -> None:
    (cells,) = [{row[0]: row[1] for row in STEPS[step].rows() if row[0] in ("writes", "properties", "units of work")}]
    tables, properties, units = (code(cells[key]) for key in ("writes", "properties", "units of work"))
    tables = [table for table in tables if table in {*SCHEMAS, "checkpoints", "training_states"}]
    of_step = {step, *OPERATIONS.get(step, ())}
    entries = [played.lake.log.entry(version) for version in played.versions[step]]
    own = [entry for entry in entries if entry is not None and entry["operation"] in of_step]
    assert {file["table"] for entry in own for file in entry["add"]} == set(tables)
    assert matching([key for entry in own for key in entry["set"]], properties) == set(properties)
    units = [unit for unit in units if "/" in unit]
    assert matching([entry["unit"] for entry in own if entry["unit"]], units) == set(units)


def test_what_may_change_while_a_training_goes_on() -> None:
    (text,) = re.findall(r"^Of these only (.*?) may change", STEPS["train"].text, re.DOTALL | re.MULTILINE)
    assert {key.removeprefix("training.") for key in code(text)} == checkpoints._MAY_CHANGE


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.path.stem)
def test_links_lead_somewhere(page: Page) -> None:
    assert [link for link in page.links() if not page.leads(link)] == []


@pytest.mark.parametrize("step", STEPS)
def test_figures_of_costs_stand_where_they_are_from(step: str) -> None:
    section = re.sub(r"```.*?```", "", STEPS[step].section("What it costs"), flags=re.DOTALL)
    page = STEPS[step]
    sources = "".join((page.path.parent / link.partition("#")[0]).read_text("utf-8") for link in page.links())
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`|\[[\d-]+\]", "", section)
    for figure in re.findall(r"(?<![\w.-])\d[\d,.]*\d", prose):
        assert figure in sources, figure


def test_every_step_has_a_page_and_the_index_names_it() -> None:
    assert {path.stem for path in (DOCS / "steps").glob("*.md")} == {*STEPS, "README"}
    assert [link for link in INDEX.links() if link.removesuffix(".md") in STEPS] == [f"{step}.md" for step in STEPS]


def test_the_section_of_tables_is_that_of_the_schemas() -> None:
    assert format_page.written(FORMAT.text) == FORMAT.text, "run python -m tests.format_page"


def listed(title: str) -> list[str]:
    """The first cells of the table in a section of the format's page."""
    rows = re.findall(r"^\| `([^`]+)` \|", FORMAT.section(title), re.MULTILINE)
    assert rows
    return rows


def test_the_log_is_as_the_format_says(played: Played) -> None:
    entries = list(played.lake.log.entries(0))
    assert {key for entry in entries for key in entry} == set(listed("Log entries"))
    assert {key for entry in entries for file in entry["add"] for key in file} == set(listed("Files"))
    assert {key for entry in entries for key in entry["set"]}
    properties = listed("Properties")
    assert matching([key for entry in entries for key in entry["set"]], properties) == set(properties)
    units = listed("Units of work")
    assert matching([entry["unit"] for entry in entries if entry["unit"]], units) == set(units)


def test_a_reader_that_follows_the_page_finds_what_the_lake_holds(played: Played) -> None:
    folder = played.folder / "lake"
    files: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    units: set[str] = set()
    for version, path in enumerate(sorted((folder / "_log").glob(f"{'[0-9]' * 20}.json"))):
        entry = json.loads(path.read_bytes())
        told = entry.pop("sha256")
        assert (path.name, hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()) == (
            f"{version:020}.json",
            told,
        )
        for gone in entry["remove"]:
            del files[gone]
        files |= {file["path"]: file for file in entry["add"]}
        properties |= entry["set"]
        units = units - {*entry["forget"]} | ({entry["unit"]} - {None})
    snapshot = played.lake.snapshot()
    assert files == {path: json.loads(json.dumps(file.to_json())) for path, file in snapshot.files.items()}
    assert {key: value for key, value in properties.items() if value is not None} == snapshot.properties
    assert units == snapshot.units
    for name, file in files.items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
        assert re.fullmatch(rf"{file['table']}/([\w-]+/)+[0-9a-f]{{16}}\.(parquet|arrow|safetensors)", name)


def test_runs_and_ids_are_as_the_page_says(played: Played) -> None:
    runs = connect(played.lake.path).sql(
        "select run, number, first_context, last_context, n_contexts from runs join corpora using (corpus)"
    )
    width = 1024 // 32
    for run, number, first, last, n_contexts in runs.fetchall():
        assert (first, last) == (number * 2**40 + run * width, number * 2**40 + min((run + 1) * width, n_contexts) - 1)


def test_weights_and_latents_are_what_the_page_says_they_are(played: Played) -> None:
    """Latents computed from cached activations, which have half precision, by the page's formula in numpy."""
    snapshot, folder = played.lake.snapshot(), played.folder / "lake"
    cached = [pa.ipc.open_file(folder / file.path).read_all() for file in snapshot.select("activations")]
    tokens = pa.concat_tables(cached)
    x = np.stack(tokens["vector"].to_numpy(zero_copy_only=False)).astype(np.float64)
    (shard,) = snapshot.properties["autoencoder/demo"]["checkpoints"][-1]["model"]
    weights = load_file(folder / shard["path"])
    x -= x.mean(1, keepdims=True)
    x /= x.std(1, ddof=1, keepdims=True) + 1e-5
    before = (x - weights["pre_bias"]) @ weights["encoder.weight"].T + weights["latent_bias"]
    row, atom = np.nonzero((before >= np.sort(before, 1)[:, [-4]]) & (before > 0))
    ours = {
        (int(tokens["context_id"][r].as_py()), tokens["pos"][r].as_py(), int(a)): before[r, a]
        for r, a in zip(row.tolist(), atom.tolist(), strict=True)
    }
    stored = connect(played.lake.path).sql("select context_id, pos, atom, act from latents where autoencoder = 'demo'")
    theirs = {(context, pos, atom): act for context, pos, atom, act in stored.fetchall()}
    both = ours.keys() & theirs.keys()
    # Where two latents are nearly alike, half precision can put the other one first.
    assert len(both) > 0.98 * len(theirs)
    for each in both:
        assert ours[each] == pytest.approx(theirs[each], rel=0.01, abs=0.01)


def test_the_python_of_the_format_is_what_samples_are_drawn_by() -> None:
    (text,) = FORMAT.of("python")
    found: dict[str, Any] = {}
    exec(text, found)
    atom, context, pos = np.array([0, 3, 2**31 - 1]), np.array([0, 5 << 40, 2**53 - 1]), np.array([0, 7, 65535])
    expected = [found["key"](7, *each) for each in zip(atom.tolist(), context.tolist(), pos.tolist(), strict=True)]
    assert priority(7, atom, context, pos).tolist() == expected


def said() -> set[str]:
    """Every text of the jobs, with dots for what is filled in."""
    found = set()
    for path in (DOCS.parent / "jobs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(each.value) if isinstance(each, ast.Constant) else "..." for each in node.values))
            elif isinstance(node, ast.Constant):
                found.add(str(node.value))
    return found


def test_lines_that_take_more_are_the_programs() -> None:
    lines = re.findall(r"^\| `([^`]+)` \|", INDEX.section("Lines that take more to bring about"), re.MULTILINE)
    assert len(lines) > 10
    assert sorted({*lines} - said()) == []
