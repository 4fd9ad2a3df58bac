"""The static site that the viewer reads: which files it has, and their columns.

    site.json                      the autoencoders of the site (Site)
    {path}/manifest.json           what one was made from (Dictionary)
    {path}/atoms.parquet           ATOMS, one file: what the list sorts, filters and searches
    {path}/pages/{block}.parquet   PAGES of ATOMS_PER_BLOCK atoms, block = atom // ATOMS_PER_BLOCK
    {path}/sequences/{block}.parquet, {path}/effects/{block}.parquet
                                   SEQUENCES and EFFECTS of these atoms, a row group for each atom, in its place
    {path}/metrics.parquet         METRICS

A browser reads a file's footer, then the row group of one atom (atoms.parquet: several, of at most ATOMS_PER_GROUP, so
that the first rows are there before the last). Numbers are at most 2**53 and what JavaScript has: int32, float or
double. Files are compressed with snappy, which needs the least code to read.

A page that holds its site itself has no files: its element `<script type="application/json" id={EMBEDDED}>` is a JSON
object of their bytes in base64 by the paths above ("site.json", "{path}/pages/0.parquet").
"""

from typing import Annotated, Final, Literal

import pyarrow as pa
from pydantic import Field

from sae.schemas.origin import Count, Exported, Strict

FORMAT: Final = 1
ATOMS_PER_BLOCK: Final = 16
ATOMS_PER_GROUP: Final = 8192
EMBEDDED: Final = "site-data"

_INT, _FLOAT, _DOUBLE, _STRING = pa.int32(), pa.float32(), pa.float64(), pa.string()


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


def _table(grain: str, order: str, *fields: pa.Field) -> pa.Schema:
    return pa.schema(fields, metadata={"grain": grain, "order": order})


def _always(*fields: tuple[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=False) for name, kind in fields]


def _maybe(*fields: tuple[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, kind) for name, kind in fields]


# As in the lake's table atoms. effect_loss and effect_kl: means over examples and their later tokens, in nats.
# explanation_score: correlation of what the explanation predicts with the activations in contexts it was not made of.
_STATISTICS: Final = [
    *_always(("atom", _INT), ("n_active", _DOUBLE), ("density", _FLOAT), ("mean_act", _FLOAT)),
    *_always(("mean_act_squared", _FLOAT), ("max_act", _FLOAT)),
    *_maybe(("skew", _FLOAT), ("kurtosis", _FLOAT), ("effect_loss", _FLOAT), ("effect_kl", _FLOAT)),
    *_maybe(("explanation", _STRING), ("explanation_score", _FLOAT)),
]

ATOMS = _table(
    "one row per atom; peak_tokens are those on which its top examples peak, the most frequent first, logit_tokens "
    "those whose logits its decoder row raises most",
    "atom",
    *_STATISTICS,
    *_always(("peak_tokens", _list(_STRING)), ("logit_tokens", _list(_STRING))),
)

# Histogram: bin b counts activations in ((b - 1) * bin_width, b * bin_width]. Logits: of the decoder row through final
# norm and unembedding. near: by decoder cosine; coactive: by correlation over tokens. source_share: of its activations.
PAGES = _table(
    "one row per atom: what its page shows but for sequences; lists of one thing are in order and of one length",
    "atom",
    *_STATISTICS,
    *_always(("hist_bin", _list(_INT)), ("hist_n", _list(_DOUBLE))),
    *_always(("up_tokens", _list(_STRING)), ("up_logits", _list(_FLOAT))),
    *_always(("down_tokens", _list(_STRING)), ("down_logits", _list(_FLOAT))),
    *_always(("near", _list(_INT)), ("near_cosine", _list(_FLOAT))),
    *_always(("coactive", _list(_INT)), ("coactive_correlation", _list(_FLOAT))),
    *_always(("source", _list(_STRING)), ("source_share", _list(_FLOAT))),
    *_always(("patterns", _list(_STRING))),
)

SEQUENCES = _table(
    "one row per example: a context and the atom's activations > 0 in it; it was chosen for act, at position idx. "
    "kind is top (contexts by falling activation) or random (a uniform sample of activations)",
    "atom, kind, rank",
    *_always(("atom", _INT), ("kind", _STRING), ("rank", _INT), ("act", _FLOAT), ("idx", _INT)),
    *_always(("context_id", _DOUBLE), ("doc_id", _DOUBLE), ("corpus", _STRING), ("source", _STRING)),
    *_always(("external_id", _STRING), ("tokens", _list(_STRING)), ("pos", _list(_INT)), ("acts", _list(_FLOAT))),
)

# by_logits and by_probs: clean - ablated; each list holds the same number of votes for every later token, one token's
# after the other's.
EFFECTS = _table(
    "one row per example whose effect is known: what ablating the atom at idx changes, an entry for each later token, "
    "the first at idx + 1; loss_diff = loss(clean) - loss(ablated), in nats: negative where the atom helped",
    "atom, kind, rank",
    *_always(("atom", _INT), ("kind", _STRING), ("rank", _INT)),
    *_always(("loss_diff", _list(_FLOAT)), ("kl", _list(_FLOAT))),
    *_always(("up_tokens_by_logits", _list(_STRING)), ("up_by_logits", _list(_FLOAT))),
    *_always(("down_tokens_by_logits", _list(_STRING)), ("down_by_logits", _list(_FLOAT))),
    *_always(("up_tokens_by_probs", _list(_STRING)), ("up_by_probs", _list(_FLOAT))),
    *_always(("down_tokens_by_probs", _list(_STRING)), ("down_by_probs", _list(_FLOAT))),
)

METRICS = _table(
    "as the lake's table metrics, of one autoencoder",
    "phase, metric, step",
    *_always(("phase", _STRING), ("metric", _STRING), ("step", _DOUBLE), ("tokens", _DOUBLE), ("value", _DOUBLE)),
)

FILES: Final[dict[str, pa.Schema]] = {
    "atoms": ATOMS,
    "pages": PAGES,
    "sequences": SEQUENCES,
    "effects": EFFECTS,
    "metrics": METRICS,
}


class Entry(Strict):
    """An autoencoder of the site and the folder of its files, relative to site.json."""

    name: str
    path: str


class Site(Strict):
    """What site.json says. `live`: a server makes the files from a lake; `subject`: it also encodes typed text.

    `warning` is shown before the first page, once.
    """

    format: int = FORMAT
    autoencoders: list[Entry]
    live: bool = False
    subject: bool = False
    warning: str | None = None


class Dictionary(Exported):
    """What an autoencoder's files were made from.

    `picked` are the atoms that are there, in order, where they are not all of the range.
    `votes` is the number of tokens in each list of EFFECTS for one later token, 0 where no effect is known. A server
    that makes the files from a lake has them all.
    """

    format: Literal["site"] = "site"
    complete: bool = True
    source: str = ""
    atoms_per_block: Annotated[int, Field(ge=1)] = ATOMS_PER_BLOCK
    picked: list[Count] = Field(default_factory=list)
    votes: Count


class Typed(Strict):
    """A text for POST api/encode."""

    autoencoder: str
    text: Annotated[str, Field(min_length=1)]


class Encoded(Strict):
    """The answer: its tokens, and of each the atoms that are most active there, most active first."""

    tokens: list[str]
    atoms: list[list[Count]]
    acts: list[list[float]]
