"""Neuronpedia's bulk files as models: a line of each is a row of the table of that name in its database.

Its importer takes the columns from a file's first line, so that every line has all of them; its text columns hold no
NUL.
"""

from typing import Annotated

from pydantic import Field

from sae.schemas.origin import Count, Strict
from sae.schemas.saedashboard import Floats, Statistics, Strings

Id = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
Number = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)$")]


class Release(Strict):
    """Line of release.jsonl."""

    name: Id
    description: str
    creatorName: str
    creatorId: str
    urls: Strings


class Model(Strict):
    """Line of model.jsonl."""

    id: Id
    displayName: str
    displayNameShort: str
    creatorId: str
    layers: Count
    neuronsPerLayer: Count
    owner: str


class SourceSet(Strict):
    """Line of sourceset.jsonl."""

    modelId: Id
    name: Id
    description: str
    type: str
    creatorName: str
    creatorId: str
    releaseName: Id
    urls: Strings


class Source(Strict):
    """Line of source.jsonl."""

    id: Id
    modelId: Id
    setName: Id
    creatorId: str
    dataset: str
    num_prompts: Count
    num_tokens_in_prompt: Count
    notes: str


class Feature(Statistics):
    """Line of features/batch-N.jsonl.gz: a row of Neuron."""

    modelId: Id
    layer: Id
    index: Number
    sourceSetName: Id
    creatorId: str
    maxActApprox: Annotated[float, Field(ge=0)]
    hasVector: bool
    hookName: str


class Activation(Strict):
    """Line of activations/batch-N.jsonl.gz."""

    id: Id
    modelId: Id
    layer: Id
    index: Number
    creatorId: str
    tokens: Strings = Field(min_length=1)
    values: Floats
    maxValue: float
    maxValueTokenIndex: Count
    minValue: float
    binMin: float
    binMax: float
    binContains: float
    qualifyingTokenIndex: Count


FILES: dict[str, type[Strict]] = {
    "release.jsonl": Release,
    "model.jsonl": Model,
    "sourceset.jsonl": SourceSet,
    "source.jsonl": Source,
    "features": Feature,
    "activations": Activation,
}
