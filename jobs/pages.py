"""The viewer's JSON of atoms: many thousands of pages in a minute, or one at once.

The text is what `AtomFile` would be written as; whatever is the same in many sequences is written once: tokens,
contexts and numbers.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from pydantic_core import to_json

from sae.jobs.ablated import Ablated, Key
from sae.jobs.atom_tables import AtomTables, Corpus
from sae.jobs.lake import Range
from sae.schemas.tables import CORPUS_SHIFT
from sae.schemas.viewer import AtomFile

_KEPT_TOKENS: Final = 4_000_000  # of contexts whose JSON is kept: about 100 MB
_KINDS: Final = ("top", "random")
_NO_SEQUENCES: Final = '"top":[],"random":[]}'


class _Numbers(dict[float, str]):
    """Activations as JSON, rounded to some decimals, half away from zero as SQL does it."""

    def __init__(self, decimals: int) -> None:
        self._scale = 10.0**decimals

    def __missing__(self, act: float) -> str:
        scaled = act * self._scale
        rounded = act
        if not math.isinf(scaled):
            whole = math.floor(scaled)
            rounded = (whole + (scaled - whole >= 0.5)) / self._scale
        self[act] = text = _json(rounded)
        return text


class _Contexts:
    """The token ids of a corpus' contexts and their strings, as JSON without the brackets."""

    def __init__(self, corpus: Corpus) -> None:
        self._tokens = corpus.tokens
        self.strings = [_json(token) for token in corpus.vocabulary.to_pylist()]
        self._numbers = [str(number) for number in range(len(self.strings))]
        self.of = functools.lru_cache(max(1, _KEPT_TOKENS // corpus.width))(self._of)

    def _of(self, context_id: int) -> tuple[str, str, int, int]:
        """Strings, ids, how many there are, and the document."""
        token_ids, document = self._tokens.of(context_id)
        strings = ",".join([self.strings[token_id] for token_id in token_ids])
        return strings, ",".join([self._numbers[token_id] for token_id in token_ids]), len(token_ids), document


class Pages:
    """The pages of an autoencoder at one version of the lake; what was made for one is kept for the next."""

    def __init__(self, tables: AtomTables, decimals: int) -> None:
        self._tables = tables
        self._contexts = functools.cache(lambda number: _Contexts(tables.corpus(number)))
        self._decimals, self._numbers = decimals, _Numbers(decimals)
        self._shares: dict[tuple[int, int], str] = {}

    def of(self, atoms: Range) -> Iterator[tuple[int, bytes, bytes | None]]:
        """Atom and JSON of an inclusive range, and the same with effects where any are known of the atom.

        All its rows are in memory: give few atoms at once. Raises LakeError where the examples are not of the latents.
        """
        heads = self._heads(atoms)
        sequences, ablated = self._sequences(atoms), Ablated(self._tables, atoms, self._decimals)
        for atom, head in heads:
            mine = [sequences.get((atom, kind), []) for kind in _KINDS]
            plain = _page(head, ([text for _, text in each] for each in mine))
            yield (
                atom,
                plain,
                _page(head, (self._with(ablated, each) for each in mine)) if atom in ablated.atoms else None,
            )

    def _with(self, ablated: Ablated, sequences: list[tuple[Key, str]]) -> list[str]:
        return [
            f"{text[:-1]}{ablated.fields(key, self._contexts(key[1] >> CORPUS_SHIFT).strings)}}}"
            for key, text in sequences
        ]

    def _heads(self, atoms: Range) -> Iterator[tuple[int, str]]:
        """Each atom's page without sequences."""
        names = ["density", "mean_act", "mean_act_squared", "skew", "kurtosis"]
        statistics = self._tables.rows("atoms", atoms, ["atom", *names]).to_pylist()
        counted = self._tables.histograms(atoms)
        start = np.searchsorted(counted["atom"].to_numpy(), np.arange(atoms[0], atoms[1] + 2))
        every, counts = counted["bin"].to_pylist(), counted["n"].to_pylist()
        for row in statistics:
            atom = row.pop("atom")
            mine = slice(start[atom - atoms[0]], start[atom - atoms[0] + 1])
            hist = {str(bin_): n for bin_, n in zip(every[mine], counts[mine], strict=True)}
            yield atom, AtomFile(**row, hist=hist, top=[], random=[]).model_dump_json(exclude_unset=True)

    def _sequences(self, atoms: Range) -> dict[tuple[int, str], list[tuple[Key, str]]]:
        """The keys and JSON of sequences in order of rank, by atom and kind."""
        examples = self._tables.examples(atoms)
        active, numbers = examples.active, self._numbers
        positions, texts = active.pos.tolist(), [numbers[act] for act in active.act.tolist()]
        columns = (examples.columns[name] for name in ("atom", "context_id", "pos", "act"))
        rows = (*columns, active.start, active.stop)
        found: dict[tuple[int, str], list[tuple[Key, str]]] = {}
        for kind, *row in zip(examples.kind, *(column.tolist() for column in rows), strict=True):
            atom, context_id, idx, act, start, stop = row
            strings, token_ids, n, document = self._contexts(context_id >> CORPUS_SHIFT).of(context_id)
            acts = _spread(positions[start:stop], texts[start:stop], n)
            text = (
                f'{{"tokens":[{strings}],"acts":[{acts}],"act":{numbers[act]},"idx":{idx},"doc_id":{document},'
                f'"density":{self._share(stop - start, n)},"token_ints":[{token_ids}]}}'
            )
            found.setdefault((atom, kind), []).append(((atom, context_id, idx), text))
        return found

    def _share(self, part: int, whole: int) -> str:
        found = self._shares.get((part, whole))
        if found is None:
            found = self._shares[part, whole] = _json(part / whole)
        return found


def _page(head: str, sequences: Iterator[list[str]]) -> bytes:
    top, random = (",".join(each) for each in sequences)
    return f'{head.removesuffix(_NO_SEQUENCES)}"top":[{top}],"random":[{random}]}}'.encode()


def _spread(positions: list[int], texts: list[str], n: int) -> str:
    """n numbers as JSON: the texts at their positions, in rising order, and zeros elsewhere."""
    parts: list[str] = []
    following = 0
    for position, text in zip(positions, texts, strict=True):
        parts += ("0.0," * (position - following), text, ",")
        following = position + 1
    return "".join((*parts, "0.0," * (n - following)))[:-1]


def _json(value: Any) -> str:
    return to_json(value).decode()
