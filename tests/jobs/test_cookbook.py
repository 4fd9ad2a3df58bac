"""Every SQL block of docs/cookbook.md, on a small lake, against the same answer computed from the activations."""

import csv
import io
import itertools
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import yaml

from sae.jobs import aggregate, lake_commands
from sae.jobs.lake import connect
from sae.schemas.config import Run
from sae.schemas.tables import SCHEMAS
from sae.statistics import priority
from tests.lakes import (
    BIN_WIDTH,
    CONTEXTS_PER_RUN,
    CORPUS,
    EXAMPLES,
    N_LATENTS,
    TOKENS,
    Small,
    encode,
    small_config,
    small_lake,
    train,
)
from tests.tiny_run import sae

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "cookbook.md").read_text("utf-8")
MACROS = sorted(path.stem for path in (ROOT / "schemas" / "sql" / "macros").glob("*.sql"))
Floats = npt.NDArray[np.float64]
# Patterns of some atoms and what they predict, with their recall and precision.
EXPLAINED: Final[dict[int, tuple[dict[str, float], float | None, float | None]]] = {
    1: ({" fox[*]": 3.5}, 0.25, 1.0),
    3: ({" a dog": 2.5, "[^] fox": 1.25}, 0.5, 0.75),
    5: ({}, None, None),
}
Rows = list[tuple[Any, ...]]
# What the page asks about its lake, and what it is here.
SWAPS: Final = {
    "2285": "3",
    "' rate'": "' a'",
    "'rate of interest'": "' fox dog'",
    "480, 57": "0, 4",
    "57": "0",
    "273": "6",
    ">= 100": ">= 5",
    ">= 20": ">= 2",
    "between 1 and 99": "between 1 and 20",
    "0.01 *": "0.3 *",
    "%-Nixon-%": "1%",
    "%-Roosevelt-%": "2.%",
}
ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(ROOT)}
ATOM, COARSE, TOKEN, TEXT, DOCUMENT = 3, 6, " a", " fox dog", 0


def blocks(language: str) -> list[tuple[str, str]]:
    """Heading and text of each fenced block of a language."""
    found = re.findall(rf"^##+ ([^\n]+)$|^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    heading, pairs = "", []
    for title, block in found:
        heading = title or heading
        pairs += [(heading, block)] if block else []
    return pairs


ONE_VERSION, TWO_VERSIONS, ONE_ATOM = (block for _, block in blocks("bash"))


@dataclass(frozen=True)
class Kitchen:
    """A lake with three autoencoders, and of each what was stored."""

    demo: Small
    early: Small
    small: Small
    directions: dict[str, Floats]

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """[context, position]: the tokens that count, which are not at position 0."""
        lengths = np.array([len(tokens) for tokens in self.demo.contexts])
        positions = np.arange(self.demo.acts.shape[1])
        return (positions < lengths[:, None]) & (positions > 0)

    def tokens(self, of: Small | None = None) -> Floats:
        """[token, atom] of all counted tokens, zeros included."""
        return np.asarray((of or self.demo).acts[self.counted], np.float64)

    def fires(self, atom: int, of: Small | None = None) -> npt.NDArray[np.bool_]:
        return (of or self.demo).acts[:, :, atom] > 0

    def text(self, context: int) -> str:
        return "".join(TOKENS[token] for token in self.demo.contexts[context])

    def cosines(self, name: str, atom: int, other: str) -> list[tuple[int, float]]:
        """Atoms of another autoencoder, or the others of the same, nearest first."""
        cosine = self.directions[other] @ self.directions[name][atom]
        found = [(at, float(cosine[at])) for at in range(len(cosine)) if (name, atom) != (other, at)]
        return sorted(found, key=lambda row: (-row[1], row[0]))


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    folder = tmp_path_factory.mktemp("cookbook") / "lake"
    demo = small_lake(folder, n_contexts=120, name="demo")
    kept = np.random.default_rng(1).random((2, *demo.acts.shape)) < 0.5
    early = replace(demo, config=small_config(folder, "early"), acts=demo.acts * kept[0])
    small = replace(demo, config=small_config(folder, "small"), acts=demo.acts[:, :, ::-1] * kept[1])
    for seed, other in enumerate((early, small), start=1):
        train(demo.lake, other.config, seed)
        for run in range(-(-len(demo.contexts) // CONTEXTS_PER_RUN)):
            encode(other, run)
        aggregate.run(other.config)
    steps = {"phase": ["validation", "train", "validation"], "step": [1, 1, 2], "tokens": [64, 64, 128]}
    metrics = pa.table({**steps, "metric": ["fvu"] * 3, "value": [0.5, 0.75, 0.25]}, schema=SCHEMAS["metrics"])
    with demo.lake.transaction("train") as transaction:
        transaction.write("metrics", metrics, autoencoder="demo", corpus=CORPUS)
        transaction.write("explanations", explanations(), autoencoder="early")
    rows = connect(str(folder)).execute("select autoencoder, list(direction order by atom) from decoders group by all")
    directions = {name: np.asarray(found, np.float64) for name, found in rows.fetchall()}
    return Kitchen(demo, early, small, directions)


def explanations() -> pa.Table:
    rows = [
        {
            "atom": atom,
            "n_examples": 8,
            "n_patterns": len(patterns),
            "patterns": list(patterns),
            "acts": list(patterns.values()),
            "trie": "{}",
            "n_tokens": 500,
            "n_active": 9,
            "n_predicted": 7,
            "recall": recall,
            "precision": precision,
            "correlation": recall,
        }
        for atom, (patterns, recall, precision) in EXPLAINED.items()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["explanations"])


def density(of: Small, counted: npt.NDArray[np.bool_]) -> Floats:
    return np.asarray((of.acts[counted] > 0).mean(axis=0))


def rare_and_strong(k: Kitchen) -> Rows:
    a = k.tokens()
    n, kurtosis = (a > 0).sum(axis=0), (a**4).mean(axis=0) / np.maximum((a**2).mean(axis=0), 1e-9) ** 2
    order = sorted((atom for atom in range(N_LATENTS) if n[atom] >= 5), key=lambda atom: -kurtosis[atom])
    rows = ((at, n[at], round(n[at] / len(a), 4), round(a[:, at].max(), 2), round(kurtosis[at])) for at in order)
    return list(rows)[:5]


def bins(k: Kitchen) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    a = k.tokens()[:, ATOM]
    return np.unique(np.ceil(a[a > 0] / BIN_WIDTH).astype(np.int64), return_counts=True)


def histogram(k: Kitchen) -> Rows:
    rows = zip(*bins(k), strict=True)
    chosen = sorted(rows, key=lambda row: (-row[1], row[0]))[:5]
    return [(at, round((at - 1) * BIN_WIDTH, 1), round(at * BIN_WIDTH, 1), n) for at, n in chosen]


def quantiles(k: Kitchen) -> Rows:
    a = np.sort(k.tokens()[:, ATOM])
    a = a[a > 0]
    return [(q, a[max(0, int(np.ceil(q * len(a))) - 1)]) for q in (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)]


def quantiles_of_bins(k: Kitchen) -> Rows:
    at, n = bins(k)
    return [(q, round(at[np.argmax(n.cumsum() / n.sum() >= q)] * BIN_WIDTH, 2)) for q in (0.5, 0.95, 0.99)]


def peaks(k: Kitchen) -> list[tuple[float, int, int]]:
    """Activation, context and position of the top examples: the first strongest place of each context."""
    a = k.demo.acts[:, :, ATOM]
    found = [(float(a[at].max()), at, int(a[at].argmax())) for at in range(len(a)) if a[at].max() > 0]
    return sorted(found, key=lambda row: (-row[0], row[1]))[:EXAMPLES]


def token_at(k: Kitchen, context: int, pos: int) -> str:
    return TOKENS[k.demo.contexts[context][pos]]


def top_examples(k: Kitchen) -> Rows:
    def text(context: int, pos: int) -> str:
        words = [TOKENS[token] for token in k.demo.contexts[context]]
        return "".join(words[:pos])[-30:] + "[[" + (words[pos] + "]]" + "".join(words[pos + 1 :]))[:25]

    return [(rank, round(act, 2), f"{at}.txt", text(at, pos)) for rank, (act, at, pos) in enumerate(peaks(k))][:5]


def random_examples(k: Kitchen) -> Rows:
    firing = np.argwhere(k.demo.acts[:, :, ATOM] > 0)
    atoms = np.full(len(firing), ATOM)
    order = np.argsort(priority(k.demo.config.seed, atoms, *firing.T))[:EXAMPLES]
    acts = k.demo.acts[:, :, ATOM]
    return [(round(float(acts[at, pos]), 2), token_at(k, at, pos), f"{at}.txt") for at, pos in firing[order].tolist()]


def peak_tokens(k: Kitchen) -> Rows:
    found: dict[str, list[float]] = {}
    for act, context, pos in peaks(k):
        found.setdefault(token_at(k, context, pos), []).append(act)
    rows = [(token, len(acts), max(acts)) for token, acts in found.items()]
    rows.sort(key=lambda row: (-row[1], -row[2], row[0]))
    return [(token, n, round(act, 2)) for token, n, act in rows[:5]]


def in_words(_: Kitchen) -> Rows:
    patterns, recall, precision = EXPLAINED[ATOM]
    return [(pattern, act, recall, precision) for pattern, act in patterns.items()]


def documents(k: Kitchen) -> Rows:
    a = k.demo.acts[:, :, ATOM]
    rows = [(f"{at}.txt", int((a[at] > 0).sum()), round(float(a[at].max()), 2)) for at in range(len(a))]
    return sorted((row for row in rows if row[1]), key=lambda row: (-row[1], int(row[0][:-4])))[:5]


def most_active_contexts(k: Kitchen) -> Rows:
    a = k.demo.acts[:, :, ATOM].astype(np.float64)
    order = sorted(range(len(a)), key=lambda at: (-a[at].sum(), at))[:5]
    return [(at, f"{at}.txt", int((a[at] > 0).sum()), round(a[at].sum(), 1)) for at in order]


def positions(k: Kitchen) -> Rows:
    a, fires = k.demo.acts[:, :, ATOM].astype(np.float64), k.fires(ATOM)
    lengths = np.array([len(tokens) for tokens in k.demo.contexts])
    rows = [
        (pos, fires[:, pos].sum(), fires[:, pos].sum() / (lengths > pos).sum(), a[fires[:, pos], pos].mean())
        for pos in np.flatnonzero(fires.any(axis=0))
    ]
    rows.sort(key=lambda row: (-row[2], row[0]))
    return [(pos, n, round(share, 4), round(mean, 2)) for pos, n, share, mean in rows[:5]]


def on_token(k: Kitchen) -> Rows:
    here = [(at, pos) for at, ids in enumerate(k.demo.contexts) for pos, i in enumerate(ids) if TOKENS[i] == TOKEN]
    rows = []
    for atom in range(N_LATENTS):
        n, fires = sum(k.fires(atom)[place] for place in here), k.fires(atom).sum()
        rows += [(atom, n, n / fires, n / len(here))] if n else []
    rows.sort(key=lambda row: (-row[2], row[0]))
    return [(atom, n, round(own, 3), round(all_, 3)) for atom, n, own, all_ in rows[:5]]


def of_document(k: Kitchen) -> Rows:
    n, size = (k.demo.acts[DOCUMENT] > 0).sum(axis=0), len(k.demo.contexts[DOCUMENT])
    share = n / np.maximum(density(k.demo, k.counted), 1e-9)
    order = sorted((at for at in range(N_LATENTS) if n[at] >= 2), key=lambda at: (-share[at], at))[:5]
    return [(at, n[at], round(share[at] / size, 1)) for at in order]


def holding(k: Kitchen) -> list[int]:
    found = [at for at in range(len(k.demo.contexts)) if TEXT in k.text(at)]
    assert found, "a text that is nowhere tests nothing"
    return found


def contexts_of_text(k: Kitchen) -> Rows:
    return [(at, f"{at}.txt") for at in holding(k)]


def atoms_of_text(k: Kitchen) -> Rows:
    n, of_all = ((acts > 0).sum(axis=(0, 1)) for acts in (k.demo.acts[holding(k)], k.demo.acts))
    order = sorted(np.flatnonzero(n), key=lambda at: (-n[at] / of_all[at], at))[:5]
    return [(at, n[at], round(n[at] / of_all[at], 3)) for at in order]


def one_token(k: Kitchen) -> Rows:
    acts, dense = k.demo.acts[0, 4], density(k.demo, k.counted)
    order = sorted(np.flatnonzero(acts), key=lambda at: (-acts[at], at))[:5]
    return [(at, round(float(acts[at]), 2), round(dense[at], 4)) for at in order]


def in_some_documents(k: Kitchen) -> Rows:
    names = [f"{at}.txt" for at in range(len(k.demo.contexts))]
    these, those = ([name.startswith(start) for name in names] for start in ("1", "2."))
    fires = k.demo.acts > 0
    n, none = fires[these].sum(axis=(0, 1)), fires[those].sum(axis=(0, 1)) == 0
    order = sorted((at for at in range(N_LATENTS) if n[at] and none[at]), key=lambda at: (-n[at], at))[:5]
    return [(at, n[at], fires[:, :, at].sum()) for at in order]


def fire_together(k: Kitchen) -> Rows:
    a = k.tokens()
    on = a > 0
    rows = []
    for atom in range(N_LATENTS):
        both = (on[:, ATOM] & on[:, atom]).sum()
        if atom != ATOM and both:
            phi, pearson = (np.corrcoef(x[:, ATOM], x[:, atom])[0, 1] for x in (on.astype(np.float64), a))
            rows.append((atom, both, round(both / on[:, ATOM].sum(), 3), round(phi, 3), round(pearson, 3)))
    return sorted(rows, key=lambda row: -row[4])[:5]


def same_direction(k: Kitchen) -> Rows:
    return [(atom, round(cosine, 3)) for atom, cosine in k.cosines("demo", ATOM, "demo")[:5]]


def split(k: Kitchen) -> Rows:
    coarse, rows = k.fires(COARSE, k.small), []
    for atom, cosine in k.cosines("small", COARSE, "demo")[:5]:
        both, fine = (coarse & k.fires(atom)).sum(), k.fires(atom).sum()
        rows += [(atom, round(cosine, 3), round(both / coarse.sum(), 3), round(both / fine, 3))] if both else []
    return rows


def changed(k: Kitchen) -> Rows:
    before, now = (density(of, k.counted) for of in (k.early, k.demo))
    order = [at for at in range(N_LATENTS) if before[at] and now[at]]
    order.sort(key=lambda at: (-abs(np.log(now[at] / before[at])), at))
    cosine = (k.directions["early"] * k.directions["demo"]).sum(axis=1)
    return [(at, round(before[at], 5), round(now[at], 5), round(cosine[at], 3)) for at in order[:5]]


def each(k: Kitchen) -> list[tuple[str, Small]]:
    return [("demo", k.demo), ("early", k.early), ("small", k.small)]


def dead(k: Kitchen) -> Rows:
    counts = [(name, (k.tokens(of) > 0).sum(axis=0)) for name, of in each(k)]
    return [(name, N_LATENTS, (n == 0).sum(), ((n >= 1) & (n <= 20)).sum()) for name, n in counts]


def held_by_the_strongest(k: Kitchen) -> Rows:
    sums = [(name, np.sort(k.tokens(of).sum(axis=0))[::-1]) for name, of in each(k)]
    return [(name, round(total[: int(np.ceil(0.3 * N_LATENTS))].sum() / total.sum(), 3)) for name, total in sums]


def training(_: Kitchen) -> Rows:
    return [("demo", 64, 0.5), ("demo", 128, 0.25)]


def encoded(k: Kitchen) -> Rows:
    runs = -(-len(k.demo.contexts) // CONTEXTS_PER_RUN)
    return [(name, CORPUS, runs, k.demo.n_tokens, BIN_WIDTH) for name, _ in each(k)]


# The blocks' answers in order of the page.
ANSWERS: Final[list[Callable[[Kitchen], Rows]]] = [
    rare_and_strong,
    histogram,
    quantiles,
    quantiles_of_bins,
    top_examples,
    random_examples,
    peak_tokens,
    in_words,
    documents,
    most_active_contexts,
    positions,
    on_token,
    of_document,
    contexts_of_text,
    atoms_of_text,
    one_token,
    in_some_documents,
    fire_together,
    same_direction,
    split,
    changed,
    dead,
    held_by_the_strongest,
    training,
    encoded,
]


def here(query: str) -> str:
    """The page's query, asking about this lake."""
    for theirs, ours in SWAPS.items():
        query = re.sub(rf"(?<![\w.]){re.escape(theirs)}(?!\d)", ours, query)
    return query


@pytest.mark.parametrize(
    ("query", "answer"),
    [pytest.param(query, answer, id=heading) for (heading, query), answer in zip(blocks("sql"), ANSWERS, strict=True)],
)
def test_the_answer_is_what_numpy_says(kitchen: Kitchen, query: str, answer: Callable[[Kitchen], Rows]) -> None:
    found = connect(kitchen.demo.config.lake).execute(here(query)).fetchall()
    expected = answer(kitchen)
    assert expected, "an answer without rows tests nothing"
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        # The lake's activations are float32.
        assert ours == (theirs if isinstance(theirs, str) else pytest.approx(theirs, rel=1e-5)), (found, expected)


def test_a_quantile_of_bins_is_at_most_a_bin_too_high(kitchen: Kitchen) -> None:
    exact = {q: act for q, act in quantiles(kitchen)}
    excess = np.array([act - exact[q] for q, act in quantiles_of_bins(kitchen)])
    assert ((excess > -1e-9) & (excess < BIN_WIDTH)).all()


def test_the_python_of_the_page_runs(kitchen: Kitchen) -> None:
    ((_, code),) = blocks("python")
    found: dict[str, Any] = {}
    exec(here(code).replace("demo/lake", kitchen.demo.config.lake), found)
    nearest = list(zip(*found["answer"].to_pydict().values(), strict=True))
    assert [at for at, _ in nearest] == [at for at, _ in kitchen.cosines("demo", ATOM, "demo")]


def test_the_autoencoders_of_the_page_are_a_config(kitchen: Kitchen) -> None:
    ((_, text),) = blocks("yaml")
    given = kitchen.demo.config.model_dump(mode="json", exclude={"autoencoder", "autoencoders"})
    assert [one.autoencoder.name for one in Run.model_validate(given | yaml.safe_load(text)).each()] == [
        "early",
        "small",
    ]


def test_atoms_of_other_widths_have_no_cosine(kitchen: Kitchen, tmp_path: Path) -> None:
    lake = kitchen.demo.copy(tmp_path / "lake").lake
    wide = pa.table({"atom": [0], "direction": [[1.0] * 5]}, schema=SCHEMAS["decoders"])
    with lake.transaction("decoders") as transaction:
        transaction.write("decoders", wide, autoencoder="wide")
    result = sae("sql", lake.path, "from nearest_atoms('demo', 3, other_ := 'wide')")
    assert result.code == 1
    (line,) = result.lines
    assert "list dimensions must be equal, got left length '5' and right length '4'" in line


def test_the_page_asks_of_this_lake_whatever_it_asks_of_its_own() -> None:
    queries = "".join(query for _, query in blocks("sql"))
    assert [theirs for theirs in SWAPS if theirs not in queries] == []
    assert len({heading for heading, _ in blocks("sql")}) >= 15


def shown(heading: str) -> list[str]:
    """The cells of the first column of a table of Markdown under a heading."""
    return re.findall(r"^\| `(\w+)\(", PAGE.split(f"## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)


def test_every_macro_is_listed_and_says_what_a_row_is() -> None:
    assert shown("The macros") == MACROS
    for name in MACROS:
        text = (ROOT / "schemas" / "sql" / "macros" / f"{name}.sql").read_text("utf-8")
        assert text.startswith("-- one row per ")
        assert f"create or replace macro {name}(" in text


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", PAGE))
def test_link_leads_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).exists()


def asked(folder: Path, of_page: str, lake: str, version: int) -> Rows:
    """What the commands of a bash block answer on another lake, run in a folder."""
    lines = re.sub(r"--version \d+", f"--version {version}", here(of_page)).replace("demo/lake", lake).splitlines()
    script = "\n".join([*lines[:-1], f"{lines[-1]} --format csv"])
    program = f'sae() {{ "{sys.executable}" -m sae.jobs.cli "$@"; }}\nset -e\n{script}'
    done = subprocess.run(["bash", "-c", program], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(float(cell) for cell in row) for row in list(csv.reader(io.StringIO(done.stdout)))[1:]]


def test_a_version_answers_what_was_encoded_then(kitchen: Kitchen, tmp_path: Path) -> None:
    lengths = np.array([len(tokens) for tokens in kitchen.demo.contexts])
    tokens = int((lengths[: 3 * CONTEXTS_PER_RUN] - 1).sum())
    # Versions 0 and 1 are tokenize and train.
    assert asked(tmp_path, ONE_VERSION, kitchen.demo.config.lake, 4) == [(3, tokens)]


def test_versions_are_compared_through_a_file(kitchen: Kitchen, tmp_path: Path) -> None:
    before = kitchen.demo.copy(tmp_path / "lake")
    version = before.lake.snapshot().version
    now = replace(before, acts=before.acts * (np.random.default_rng(3).random(before.acts.shape) < 0.7))
    lake_commands.drop(Namespace(lake=before.config.lake, latents="demo", autoencoder=None))
    for run in range(-(-len(now.contexts) // CONTEXTS_PER_RUN)):
        encode(now, run)
    aggregate.run(now.config)
    was, is_ = (density(of, kitchen.counted) for of in (before, now))
    found = asked(tmp_path, TWO_VERSIONS, before.config.lake, version)
    # Those of the other autoencoders did not change.
    order = sorted(np.flatnonzero(was != is_), key=lambda at: (-abs(was[at] - is_[at]), at))[:5]
    assert [row[0] for row in found] == order
    np.testing.assert_allclose(found, [(at, was[at], is_[at]) for at in order], rtol=1e-12)


def test_one_atom_is_asked_for_alone(kitchen: Kitchen, tmp_path: Path) -> None:
    assert asked(tmp_path, ONE_ATOM, kitchen.demo.config.lake, 0) == quantiles(kitchen)
