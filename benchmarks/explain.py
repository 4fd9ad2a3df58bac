"""N2G of many atoms at once beside one atom and one sequence at a time, in one process, on a lake that is aggregated.

At once: what `sae explain` does, without its commits. Apart: the same search of the same examples as a program makes it
that asks a model about one sequence for one atom: a forward of that sequence, and all latents of all its positions; and
the search of the reference, which tries ends of any length and no gaps, made in the same way.
Half of the atoms that are done apart come before the others and half after; they are drawn at random. Matching is that
of all contexts that the step scores on; apart it is a walk through an atom's trie from every token of some.

`make demo` leaves a lake: python -m benchmarks.explain demo/run.yaml
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks._report import RESULTS, append, machine, section
from sae.jobs import atom_units, checkpoints, explain, ranges
from sae.jobs.cli import load_config
from sae.jobs.explain import Explainer
from sae.jobs.lake import Lake, Range, Snapshot
from sae.model import Autoencoder
from sae.n2g.build import Settings, Tests, pattern_of
from sae.n2g.compiled import Compiled
from sae.n2g.pattern import Pattern
from sae.n2g.probes import Latents
from sae.n2g.trie import Trie
from sae.schemas.config import Run
from sae.subject import Subject

TARGET = 20.0
Array = Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo/run.yaml", help="a run whose lake is aggregated")
    parser.add_argument("--atoms", type=int, default=1000)
    parser.add_argument("--apart", type=int, default=20, help="atoms that are done one at a time")
    parser.add_argument("--contexts", type=int, default=50, help="contexts that are walked through, of one atom")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--save", metavar="FOLDER", nargs="?", const=RESULTS, help="append the table to <date>.md there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if not Path(args.config).exists():
        print(f"needs a lake: {args.config} is not there; make demo leaves one")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    found = measured(args, load_config(args.config))
    result = described(found)
    print(section(result), flush=True)
    if args.save is not None:
        append(result, Path(args.save))
    if args.json:
        print(json.dumps(result))


class Counted:
    """Notes how many sequences and tokens a subject ran."""

    def __init__(self, run: Callable[[Array], list[Latents]]) -> None:
        self._run, self.sequences, self.tokens, self.batches = run, 0, 0, 0

    def __call__(self, token_ids: Array) -> list[Latents]:
        self.sequences += len(token_ids)
        self.tokens += token_ids.size
        self.batches += 1
        return self._run(token_ids)


def measured(args: argparse.Namespace, config: Run) -> dict[str, Any]:
    lake = Lake(config.lake)
    snapshot, name = lake.snapshot(), config.autoencoder.name
    source = explain._source(snapshot, config)
    n_latents = checkpoints.state_of(snapshot, name)["n_latents"]
    wanted, at_once = (0, min(args.atoms, n_latents) - 1), config.explain.unit_atoms
    units = [(low, min(low + at_once - 1, wanted[1])) for low in range(0, wanted[1] + 1, at_once)]
    explainer = Explainer(config, source, units, explain._drawn(snapshot, config), 1)
    counted = Counted(explainer._prober._run)
    explainer._prober._run = counted
    alone = Alone(config, lake, explainer._settings)
    few = some(lake, snapshot, config, wanted, args.apart)
    like_reference = Alone(
        config, lake, dataclasses.replace(explainer._settings, length=config.corpus.context_length, gap=0)
    )
    apart = [(alone.seconds(atom, snapshot), like_reference.seconds(atom, snapshot)) for atom in few[: len(few) // 2]]
    spent = {"patterns": 0.0, "scores": 0.0}
    tries: list[Trie] = []
    tables: list[pa.Table] = []
    n_examples, given = 0, config.explain
    for atoms in units:
        began = time.perf_counter()
        examples = atom_units.examples(lake, snapshot, name, atoms, given.kinds, given.ranks)
        n_examples += examples.num_rows
        tries += explainer._tries(snapshot, atoms, examples)
        found = time.perf_counter()
        tables.append(explainer._scored(snapshot, atoms, examples, tries[atoms[0] :]))
        ended = time.perf_counter()
        spent["patterns"] += found - began
        spent["scores"] += ended - found
        print(f"atoms {atoms[0]} to {atoms[1]}: {found - began:.1f} s, scored in {ended - found:.1f} s", flush=True)
    apart += [(alone.seconds(atom, snapshot), like_reference.seconds(atom, snapshot)) for atom in few[len(few) // 2 :]]
    rows = pa.concat_tables(tables)
    return {
        "atoms": ranges.size([wanted]),
        "examples": n_examples,
        "patterns": int(np.sum(rows["n_patterns"].to_numpy())),
        "sequences": counted.sequences,
        "tokens": counted.tokens,
        "batches": counted.batches,
        "at_once_s": spent,
        "apart_s": [same for same, _ in apart],
        "reference_s": [reference for _, reference in apart],
        "apart_calls": alone.calls,
        "reference_calls": like_reference.calls,
        "same": sum(alone.patterns[atom] == [one.elements for one in tries[atom].patterns()] for atom in few),
        **matching(args, explainer, tries, few),
        **{key: _median(rows[key]) for key in ("recall", "precision", "correlation")},
    }


def some(lake: Lake, snapshot: Snapshot, config: Run, wanted: Range, n: int) -> list[int]:
    """Atoms that have examples, drawn at random."""
    rows = atom_units.examples(lake, snapshot, config.autoencoder.name, wanted, ("top",), 1)
    known = np.unique(rows["atom"].to_numpy())
    drawn: list[int] = np.random.default_rng(0).choice(known, min(n, len(known)), replace=False).tolist()
    return drawn


class Alone:
    """One sequence at a time: the subject by itself, and every latent of every position."""

    def __init__(self, config: Run, lake: Lake, settings: Settings) -> None:
        self._config, self._lake, self._settings = config, lake, settings
        self._subject = Subject.load(**config.subject.model_dump())
        chosen = config.encode.weights, config.encode.checkpoint
        self._autoencoder: Autoencoder = checkpoints.load(lake, config.autoencoder.name, *chosen)
        self.calls = 0
        self.patterns: dict[int, list[tuple[int, ...]]] = {}

    def seconds(self, atom: int, snapshot: Snapshot) -> float:
        """That the patterns of one atom take."""
        given, name = self._config.explain, self._config.autoencoder.name
        rows = atom_units.examples(self._lake, snapshot, name, (atom, atom), given.kinds, given.ranks)
        tokens = atom_units.token_ids(self._lake, snapshot, rows["context_id"].to_numpy())
        began = time.perf_counter()
        found = []
        for own, pos, act in zip(tokens, rows["pos"].to_pylist(), rows["act"].to_pylist(), strict=True):
            found.append(self._driven(pattern_of(tuple(own[: pos + 1].tolist()), act, self._settings), atom))
        self.patterns[atom] = [one.elements for one in Trie(filter(None, found), self._settings.gap).patterns()]
        return time.perf_counter() - began

    def _driven(self, tests: Tests, atom: int) -> Pattern | None:
        acts: list[float] | None = None
        try:
            while True:
                wanted = tests.send(acts) if acts is not None else next(tests)
                acts = [self._act(sequence, atom) for sequence in wanted]
        except StopIteration as end:
            found: Pattern | None = end.value
            return found

    @torch.inference_mode()
    def _act(self, sequence: tuple[int, ...], atom: int) -> float:
        self.calls += 1
        acts = self._subject.forward(torch.tensor([sequence]))
        latents, _ = self._autoencoder.encode(acts.float())
        return float(latents[0, -1, atom])


def matching(args: argparse.Namespace, explainer: Explainer, tries: list[Trie], few: list[int]) -> dict[str, float]:
    """Tokens times atoms a second, of all tries together and of single ones."""
    drawn = explainer._drawn
    began = time.perf_counter()
    Compiled(tries).match(drawn.tokens, drawn.offsets)
    taken = time.perf_counter() - began
    contexts = [each.tolist() for each in np.split(drawn.tokens, drawn.offsets[1:-1])[: args.contexts]]
    began = time.perf_counter()
    for atom in few:
        for tokens in contexts:
            tries[atom].predict(tokens)
    walked = time.perf_counter() - began
    n_walked = len(few) * sum(map(len, contexts))
    return {
        "matched_tokens": len(drawn.tokens),
        "match_s": taken,
        "matched_per_s": len(tries) * len(drawn.tokens) / taken,
        "walked_per_s": n_walked / walked,
    }


def _median(column: pa.ChunkedArray) -> float:
    return float(statistics.median(column.drop_null().to_pylist()))


def described(found: dict[str, Any]) -> dict[str, Any]:
    n, n_apart = found["atoms"], len(found["apart_s"])
    patterns, scores = (found["at_once_s"][key] for key in ("patterns", "scores"))
    apart, reference = (statistics.mean(found[key]) for key in ("apart_s", "reference_s"))
    ratio, faster = reference * n / patterns, found["matched_per_s"] / found["walked_per_s"]
    walked = n * found["matched_tokens"] / found["walked_per_s"]
    caption = (
        f"{n:,} atoms, {found['examples']:,} examples, {found['patterns']:,} patterns. At once the subject ran "
        f"{found['sequences']:,} sequences of {found['tokens']:,} tokens in {found['batches']:,} batches, "
        f"{found['tokens'] / max(1, found['examples']):.1f} tokens an example; apart it was called "
        f"{found['apart_calls'] / n_apart:,.0f} times an atom, as the reference searches, with ends of any length and "
        f"no gaps, {found['reference_calls'] / n_apart:,.0f} times ({statistics.median(found['reference_s']):.1f} s "
        f"for the median atom), and {found['same']} of {n_apart} atoms had the same patterns. "
        "Seconds of what was done on fewer atoms or contexts are extrapolated. Median over atoms, "
        f"on other contexts: recall {found['recall']:.2f}, precision {found['precision']:.2f}, correlation "
        f"{found['correlation']:.2f}."
    )
    return {
        "benchmark": "explain",
        "command": "python -m benchmarks.explain",
        "machine": {**machine(torch.device("cpu")), "device": _processor()},
        "caption": caption,
        "columns": ["", f"s for {n:,} atoms", "ms an atom", "times as long as at once"],
        "table": [
            _row("patterns, at once", patterns, n, "1"),
            _row(f"patterns, apart ({n_apart} atoms)", apart * n, n, f"{apart * n / patterns:.1f}"),
            _row(
                f"as the reference searches ({n_apart} atoms)", reference * n, n, f"{ratio:.1f} (target: {TARGET:.0f})"
            ),
            _row("matching all contexts, at once", found["match_s"], n, "1"),
            _row(f"matching, apart ({n_apart} atoms)", walked, n, f"{faster:.0f}"),
            _row("matching, activations and scores", scores, n, "-"),
        ],
        "rows": [{**found, "ratio": ratio, "target": TARGET, "threads": torch.get_num_threads()}],
    }


def _row(what: str, seconds: float, n: int, ratio: str) -> list[str]:
    return [what, f"{seconds:,.1f}", f"{1e3 * seconds / n:,.2f}", ratio]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{sum(line.startswith('processor') for line in lines)} cores of {model}"


if __name__ == "__main__":
    main()
