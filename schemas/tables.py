"""Arrow schemas of the lake's tables: grain, units and order.

A table's grain and order are kept in its schema's metadata, so that a Parquet file explains itself.
Positions count from 0 within a context; activations have the unit of the autoencoder's latents.
"""

from typing import Final

import pyarrow as pa

# An id holds the corpus number in its high bits and the ordinal within the corpus below, and stays under 2**53, so
# that it survives JSON readers that know only doubles.
CORPUS_SHIFT: Final = 40
MAX_CORPORA: Final = 2 ** (53 - CORPUS_SHIFT)


def _table(grain: str, order: str, *fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in fields],
        metadata={"grain": grain, "order": order},
    )


DOCUMENTS = _table(
    "one row per document",
    "doc_id",
    ("doc_id", pa.int64()),
    ("source", pa.string()),
    ("external_id", pa.string()),
    ("n_tokens", pa.int64()),
)

CONTEXTS = _table(
    "one row per token window of one document",
    "context_id",
    ("context_id", pa.int64()),
    ("doc_id", pa.int64()),
    ("start", pa.int32()),
    ("token_ids", pa.list_(pa.field("item", pa.int32(), nullable=False))),
)

VOCABULARY = _table(
    "one row per token id of a corpus' tokenizer",
    "token_id",
    ("token_id", pa.int32()),
    ("token", pa.string()),
)


def activations(d_model: int) -> pa.Schema:
    """The cache of subject activations; width d_model, half precision."""
    vector = pa.list_(pa.field("item", pa.float16(), nullable=False), d_model)
    return _table(
        "one row per kept token",
        "context_id, pos",
        ("context_id", pa.int64()),
        ("pos", pa.uint16()),
        ("vector", vector),
    )


LATENTS = _table(
    "one row per nonzero latent; act is rounded to 10 mantissa bits",
    "atom, context_id, pos",
    ("atom", pa.int32()),
    ("context_id", pa.int64()),
    ("pos", pa.uint16()),
    ("act", pa.float32()),
)

LATENTS_BY_TOKEN = _table(
    "one row per nonzero latent of a run, as in latents",
    "context_id, pos, atom",
    *((field.name, field.type) for field in LATENTS),
)

MOMENTS = _table(
    "one row per (run, atom) with n_active > 0; sums are over activations > 0",
    "atom",
    ("run", pa.int32()),
    ("atom", pa.int32()),
    ("n_active", pa.int64()),
    ("sum_act", pa.float64()),
    ("sum_act2", pa.float64()),
    ("sum_act3", pa.float64()),
    ("sum_act4", pa.float64()),
    ("max_act", pa.float32()),
)

HISTOGRAMS = _table(
    "one row per (run, atom, bin); bin = ceil(act / bin_width), the width is a property of the encoding",
    "atom, bin",
    ("run", pa.int32()),
    ("atom", pa.int32()),
    ("bin", pa.int32()),
    ("n", pa.int64()),
)

TOP = _table(
    "up to 50 rows per (run, atom): the contexts with the highest activation; pos is its first position",
    "atom, act descending, context_id",
    ("run", pa.int32()),
    ("atom", pa.int32()),
    ("context_id", pa.int64()),
    ("pos", pa.uint16()),
    ("act", pa.float32()),
)

SAMPLES = _table(
    "up to 50 rows per (run, atom): a uniform sample that merges exactly, those whose keys have the smallest hashes",
    "atom, context_id, pos",
    ("run", pa.int32()),
    ("atom", pa.int32()),
    ("context_id", pa.int64()),
    ("pos", pa.uint16()),
    ("act", pa.float32()),
)

ATOMS = pa.schema(
    [
        pa.field("atom", pa.int32(), nullable=False),
        pa.field("n_active", pa.int64(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("mean_act", pa.float64(), nullable=False),
        pa.field("mean_act_squared", pa.float64(), nullable=False),
        pa.field("skew", pa.float64()),
        pa.field("kurtosis", pa.float64()),
        pa.field("max_act", pa.float64(), nullable=False),
    ],
    metadata={"grain": "one row per atom; moments are over all tokens, zeros included", "order": "atom"},
)

EXAMPLES = _table(
    "one row per (atom, kind, rank); kind is top or random",
    "atom, kind, rank",
    ("atom", pa.int32()),
    ("kind", pa.string()),
    ("rank", pa.int32()),
    ("context_id", pa.int64()),
    ("pos", pa.uint16()),
    ("act", pa.float32()),
)

DECODERS = _table(
    "one row per atom; direction is its decoder row, unit norm, of the weights that it is encoded with",
    "atom",
    ("atom", pa.int32()),
    ("direction", pa.list_(pa.field("item", pa.float32(), nullable=False))),
)

FLOATS: Final = pa.list_(pa.field("item", pa.float32(), nullable=False))
_TOKENS: Final = pa.list_(pa.field("item", pa.int32(), nullable=False))

EFFECTS = _table(
    "one row per (atom, context_id, pos): what taking the atom out at pos changes, clean - ablated, an entry for each "
    "later token, the first at pos + 1. loss_diff and kl are in nats, loss_diff negative where the atom helped; the "
    "other lists hold the same number of tokens for every later one, one's after the other's, the largest change first",
    "atom, context_id, pos",
    ("atom", pa.int32()),
    ("context_id", pa.int64()),
    ("pos", pa.uint16()),
    ("act", pa.float32()),
    ("loss_diff", FLOATS),
    ("kl", FLOATS),
    ("up_tokens_by_logits", _TOKENS),
    ("up_by_logits", FLOATS),
    ("down_tokens_by_logits", _TOKENS),
    ("down_by_logits", FLOATS),
    ("up_tokens_by_probs", _TOKENS),
    ("up_by_probs", FLOATS),
    ("down_tokens_by_probs", _TOKENS),
    ("down_by_probs", FLOATS),
)

LOGITS = _table(
    "one row per (atom, kind, rank): a token whose logit the decoder row raises (kind up) or lowers (down) most; value "
    "is that row through the linear part of the final norm, but for its scale, and the unembedding",
    "atom, kind, rank",
    ("atom", pa.int32()),
    ("kind", pa.string()),
    ("rank", pa.int32()),
    ("token_id", pa.int32()),
    ("value", pa.float32()),
)

NEIGHBOURS = _table(
    "one row per (atom, kind, rank); kind near: value is the cosine of both decoder rows, coactive: the correlation of "
    "both activations over a sample of tokens, zeros included",
    "atom, kind, rank",
    ("atom", pa.int32()),
    ("kind", pa.string()),
    ("rank", pa.int32()),
    ("neighbour", pa.int32()),
    ("value", pa.float32()),
)

EXPLANATIONS = pa.schema(
    [
        pa.field("atom", pa.int32(), nullable=False),
        pa.field("n_examples", pa.int32(), nullable=False),
        pa.field("n_patterns", pa.int32(), nullable=False),
        pa.field("patterns", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
        pa.field("acts", FLOATS, nullable=False),
        pa.field("trie", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("n_active", pa.int64(), nullable=False),
        pa.field("n_predicted", pa.int64(), nullable=False),
        pa.field("recall", pa.float64()),
        pa.field("precision", pa.float64()),
        pa.field("correlation", pa.float64()),
    ],
    metadata={
        "grain": "one row per atom. patterns are the text of its patterns, with [*] for any token, [...] for any "
        "number of them and [^] for the start of a context, the strongest first, and acts what they predict; trie is "
        "the same for sae.n2g.trie.Trie.from_json. n_tokens are tokens of other contexts than those of its "
        "n_examples, n_active of them active and n_predicted predicted to be; recall, precision and Pearson's "
        "correlation, zeros included, are null where nothing is active, predicted, or either",
        "order": "atom",
    },
)

METRICS = _table(
    "one row per (autoencoder, corpus, phase, step, metric); phase is train, validation or "
    "evaluate, or machine where the value depends on what it was trained on",
    "step, metric",
    ("phase", pa.string()),
    ("step", pa.int64()),
    ("tokens", pa.int64()),
    ("metric", pa.string()),
    ("value", pa.float64()),
)

DISTRIBUTIONS = _table(
    "one row per (autoencoder, corpus, distribution, bin) of an evaluation: n values, lower <= value < upper, "
    "or zeros where both are 0; density: atoms by the fraction of tokens on which they are active; max_act: those that "
    "are active at all, by their largest activation; l0: tokens by how many atoms are active",
    "distribution, bin",
    ("distribution", pa.string()),
    ("bin", pa.int32()),
    ("lower", pa.float64()),
    ("upper", pa.float64()),
    ("n", pa.int64()),
)

# Width 0 stands for any: the activations of an autoencoder's subject have one width each.
SCHEMAS: Final[dict[str, pa.Schema]] = {
    "documents": DOCUMENTS,
    "contexts": CONTEXTS,
    "vocabulary": VOCABULARY,
    "activations": activations(0),
    "latents": LATENTS,
    "latents_by_token": LATENTS_BY_TOKEN,
    "moments": MOMENTS,
    "histograms": HISTOGRAMS,
    "top": TOP,
    "samples": SAMPLES,
    "atoms": ATOMS,
    "examples": EXAMPLES,
    "decoders": DECODERS,
    "effects": EFFECTS,
    "logits": LOGITS,
    "neighbours": NEIGHBOURS,
    "explanations": EXPLANATIONS,
    "metrics": METRICS,
    "distributions": DISTRIBUTIONS,
}
