"""A small site for the viewer, of made-up atoms: python -m tests.sites FOLDER --atoms 20."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.schemas import site

DEAD = 3  # an atom that never fires
NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"'`&amp;",
    "NUL\x00here",
    "\u202eright to left\u202c",
    "\u200f",
    "שלום",
    "👩‍👩‍👧‍👦",
    "e\u0301\u0302\u0303",
    "\n",
    "\n\n",
    "\t",
    "  ",
    "\u00a0",
    "",
    "x" * 10_000,
    "\ufffd",
]
_TEXT = """
    the of to and a in is that for it was on are as with his they at be this from have or by one had not but what all
    were when we there can an your which their said if do will each about how up out them then she many some so these
    would other into has more her two like him see time could no make than first been its who now people my made over
    did down only way find use may water long little very after words called just where most know
"""
_WORDS = np.array(_TEXT.split())
_VOTES = 5
_WIDTH = 0.25


def _words(rng: np.random.Generator, n: int) -> list[str]:
    return [f" {word}" for word in rng.choice(_WORDS, n)]


def _statistics(rng: np.random.Generator, atom: int, n_tokens: int) -> dict[str, Any]:
    """The columns that atoms and pages share."""
    dead = atom == DEAD
    density = 0.0 if dead else float(10 ** rng.uniform(-5, -1))
    mean_active = float(rng.gamma(4, 0.4))
    described = not dead and atom % 3 != 2
    return {
        "atom": atom,
        "n_active": float(round(density * n_tokens)),
        "density": density,
        "mean_act": density * mean_active,
        "mean_act_squared": density * mean_active**2 * 1.3,
        "max_act": 0.0 if dead else mean_active * 5,
        "skew": None if dead else 1.4 / density**0.5,
        "kurtosis": None if dead else 2.2 / density,
        "effect_loss": None if dead else float(rng.normal(-0.02, 0.02)),
        "effect_kl": None if dead else float(rng.gamma(2, 0.01)),
        "explanation": f"fires on{_words(rng, 1)[0]} before{_words(rng, 1)[0]}" if described else None,
        "explanation_score": float(rng.uniform(0, 1)) if described else None,
    }


def _listed(rng: np.random.Generator, statistics: dict[str, Any]) -> dict[str, Any]:
    dead = statistics["n_active"] == 0
    tokens = {"peak_tokens": [] if dead else _words(rng, 3), "logit_tokens": _words(rng, 5)}
    if statistics["atom"] == 1:
        tokens["peak_tokens"] = NASTY[:4]
    return {**statistics, **tokens}


def _page(rng: np.random.Generator, statistics: dict[str, Any], n_atoms: int) -> dict[str, Any]:
    dead = statistics["n_active"] == 0
    bins = [] if dead else list(range(1, int(statistics["max_act"] / _WIDTH) + 2))
    shares = np.exp(-0.25 * np.arange(len(bins)))
    others = [int(other) for other in rng.integers(0, n_atoms, 6)]
    falling = sorted(rng.uniform(0, 1, 10).tolist(), reverse=True)
    return {
        **statistics,
        "hist_bin": bins,
        "hist_n": [] if dead else np.ceil(statistics["n_active"] * shares / shares.sum()).tolist(),
        "up_tokens": NASTY[:10] if statistics["atom"] == 1 else _words(rng, 10),
        "up_logits": falling,
        "down_tokens": _words(rng, 10),
        "down_logits": [-value for value in falling],
        "near": others,
        "near_cosine": falling[:6],
        "coactive": [] if dead else others,
        "coactive_correlation": [] if dead else falling[:6],
        "source": [] if dead else ["addresses", "letters"],
        "source_share": [] if dead else [0.75, 0.25],
        "patterns": [] if dead else [" rate of", " the rate"],
    }


def _sequences(rng: np.random.Generator, statistics: dict[str, Any], n: int, length: int) -> list[dict[str, Any]]:
    rows = []
    for kind in ("top", "random") if statistics["n_active"] else ():
        size = statistics["max_act"] * (np.linspace(1, 0.7, n) if kind == "top" else rng.uniform(0.02, 1, n))
        for rank, act in enumerate(size.astype(np.float32)):
            tokens = _words(rng, length)
            if statistics["atom"] == 1 and rank == 0:
                tokens[: len(NASTY)] = NASTY
            idx = int(rng.integers(8, length - 8))
            pos = sorted({idx, *rng.integers(0, length, 4).tolist()})
            context = int(rng.integers(0, 2**41))
            rows.append(
                {
                    **{"atom": statistics["atom"], "kind": kind, "rank": rank, "act": act, "idx": idx},
                    **{"context_id": float(context), "doc_id": float(context // 7), "corpus": "letters"},
                    **{"source": "addresses", "external_id": f"address-{context % 97}.txt", "tokens": tokens},
                    "pos": pos,
                    "acts": [act if here == idx else np.float32(act * rng.uniform(0.1, 0.9)) for here in pos],
                }
            )
    return rows


def _effect(rng: np.random.Generator, sequence: dict[str, Any]) -> dict[str, Any]:
    n = len(sequence["tokens"]) - sequence["idx"] - 1
    row = {name: sequence[name] for name in ("atom", "kind", "rank")}
    row["loss_diff"] = rng.normal(-0.05, 0.2, n).tolist()
    row["kl"] = rng.gamma(1, 0.05, n).tolist()
    for by in ("logits", "probs"):
        for side, sign in (("up", 1), ("down", -1)):
            row[f"{side}_tokens_by_{by}"] = _words(rng, n * _VOTES)
            row[f"{side}_by_{by}"] = (sign * rng.uniform(0, 2, n * _VOTES)).tolist()
    return row


def _metrics(rng: np.random.Generator) -> list[dict[str, Any]]:
    steps = np.linspace(2_000, 400_000, 200)
    curves = {
        ("train", "fvu"): 0.15 + np.exp(-steps / 40_000) + rng.normal(0, 0.004, len(steps)),
        ("train", "l0"): np.full(len(steps), 32.0),
        ("train", "dead"): 0.02 * (1 - np.exp(-steps / 90_000)),
    }
    rows = [
        {"phase": phase, "metric": metric, "step": step / 2_000, "tokens": step, "value": value}
        for (phase, metric), values in curves.items()
        for step, value in zip(steps, values, strict=True)
    ]
    quality = {"fvu": 0.145, "l0": 32.0, "dead_fraction": 0.0026, "loss_clean": 3.57, "loss_recovered": 0.989}
    return rows + [
        {"phase": "evaluate", "metric": name, "step": 200.0, "tokens": 400_000.0, "value": value}
        for name, value in quality.items()
    ]


def _write(path: Path, table: str, groups: list[list[dict[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = site.FILES[table]
    with pq.ParquetWriter(path, schema, compression="snappy", write_statistics=False) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=max(len(rows), 1))


def write_dictionary(
    folder: Path, name: str, n_atoms: int, n_pages: int, examples: int = 20, length: int = 64, seed: int = 0
) -> None:
    """One autoencoder's files; atoms from `n_pages` on have no page."""
    rng = np.random.default_rng(seed)
    n_tokens = 10_000_000
    statistics = [_statistics(rng, atom, n_tokens) for atom in range(n_atoms)]
    listed = [_listed(rng, one) for one in statistics]
    size = site.ATOMS_PER_GROUP
    _write(folder / "atoms.parquet", "atoms", [listed[start : start + size] for start in range(0, n_atoms, size)])
    for block in range(-(-n_pages // site.ATOMS_PER_BLOCK)):
        here = statistics[block * site.ATOMS_PER_BLOCK : min(n_pages, (block + 1) * site.ATOMS_PER_BLOCK)]
        sequences = [_sequences(rng, one, examples, length) for one in here]
        effects = [[_effect(rng, row) for row in rows if row["kind"] == "top"] for rows in sequences]
        _write(folder / "pages" / f"{block}.parquet", "pages", [[_page(rng, one, n_atoms) for one in here]])
        _write(folder / "sequences" / f"{block}.parquet", "sequences", sequences)
        _write(folder / "effects" / f"{block}.parquet", "effects", effects)
    _write(folder / "metrics.parquet", "metrics", [_metrics(rng)])
    manifest = site.Dictionary.model_validate(
        {
            **{"autoencoder": name, "checkpoint": f"checkpoints/{name}", "model": "smollm2", "hook": "blocks.4.mlp"},
            **{"masked_positions": [0], "corpora": ["letters"], "n_tokens": n_tokens, "trained_tokens": 400_000},
            **{"n_latents": n_atoms, "k": 32, "bin_width": _WIDTH, "atoms": (0, n_atoms - 1), "votes": _VOTES},
            **{"sign_convention": "negative where the atom helped", "lake_version": 7, "versions": {"sae": "0.1.0"}},
        }
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def write_site(
    folder: Path, n_atoms: int, n_pages: int | None = None, warning: str | None = None, examples: int = 20
) -> None:
    """A site of two autoencoders, `letters` of `n_atoms` and `small` of 20; only `n_pages` of its atoms have pages."""
    write_dictionary(folder / "letters", "letters", n_atoms, n_atoms if n_pages is None else n_pages, examples)
    write_dictionary(folder / "small", "small", 20, 20, seed=1)
    entries = [site.Entry(name=name, path=name) for name in ("letters", "small")]
    said = site.Site(autoencoders=entries, warning=warning)
    (folder / "site.json").write_text(said.model_dump_json())


def write_reference(folder: Path) -> None:
    """Two atoms as the reference viewer's JSON, the second without effects."""
    rng = np.random.default_rng(5)
    for name in ("7-ablated", "8"):
        tokens = _words(rng, 12)
        acts = [0.0] * 4 + [3.0, 1.5] + [0.0] * 6
        sequence: dict[str, Any] = {"tokens": tokens, "acts": acts, "act": 3.0, "idx": 4, "doc_id": "a-1"}
        sequence |= {"density": 2 / 12, "token_ints": list(range(12))}
        if name.endswith("ablated"):
            votes = [None] * 4 + [[0.5, 0.25]] * 7
            words = [None] * 4 + [[" more", " less"]] * 7
            sequence |= {"ablate_loss_diff": [0.0] * 4 + [-0.3] * 7, "kl": [None] * 4 + [0.1] * 7}
            for by in ("logits", "probs"):
                sequence |= {f"top_upvotes_{by}": votes, f"top_downvotes_{by}": votes}
                sequence |= {f"top_upvote_tokens_{by}": words, f"top_downvote_tokens_{by}": words}
        page: dict[str, Any] = {
            "density": 0.01,
            "mean_act": 0.02,
            "mean_act_squared": 0.05,
            "skew": 12.0,
            "kurtosis": 180.0,
        }
        page |= {"hist": {"1": 20, "15": 3}, "top": [sequence], "random": [sequence]}
        (folder / "atoms").mkdir(parents=True, exist_ok=True)
        (folder / "atoms" / f"{name}.json").write_text(json.dumps(page))


def main() -> None:
    """Write a site to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--atoms", type=int, default=20)
    parser.add_argument("--pages", type=int, help="how many of the atoms have pages; all of them unless told")
    parser.add_argument("--examples", type=int, default=20, help="of each kind, of an atom")
    parser.add_argument("--warning", help="what is shown before the first page")
    arguments = parser.parse_args()
    write_site(arguments.folder, arguments.atoms, arguments.pages, arguments.warning, arguments.examples)
    write_reference(arguments.folder / "reference")


if __name__ == "__main__":
    main()
