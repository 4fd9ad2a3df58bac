"""SAEDashboard's batch-N.json as models: the fields that its reader takes, and no other."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from sae.schemas.origin import Count, Strict

Floats = list[float]
Strings = list[str]
Share = Annotated[float, Field(ge=0, le=1)]


class Activation(Strict):
    """A context with the feature's activation at every token; it was chosen for that at `qualifying_token_index`.

    Of the strongest ones `bin_min` and `bin_contains` are -1 and `bin_max` is the largest activation; of the others
    `bin_contains` is the share of all activations in (bin_min, bin_max].
    """

    bin_min: float
    bin_max: float
    bin_contains: Annotated[float, Field(ge=-1, le=1)]
    tokens: Strings = Field(min_length=1)
    values: Floats
    qualifying_token_index: Count

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len(self.tokens) != len(self.values):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.values)} values")
        if self.qualifying_token_index >= len(self.tokens):
            raise ValueError(f"qualifying_token_index is {self.qualifying_token_index} of {len(self.tokens)} tokens")
        return self


class Statistics(Strict):
    """What is told of a feature but for its activations; Neuronpedia has the same columns."""

    neuron_alignment_indices: list[Count]
    neuron_alignment_values: Floats
    neuron_alignment_l1: Floats
    correlated_neurons_indices: list[Count]
    correlated_neurons_l1: Floats
    correlated_neurons_pearson: Floats
    correlated_features_indices: list[Count]
    correlated_features_l1: Floats
    correlated_features_pearson: Floats
    neg_str: Strings
    neg_values: Floats
    pos_str: Strings
    pos_values: Floats
    frac_nonzero: Share
    freq_hist_data_bar_values: Floats
    freq_hist_data_bar_heights: Floats
    logits_hist_data_bar_values: Floats
    logits_hist_data_bar_heights: Floats
    decoder_weights_dist: Floats
    vector: Floats

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        pairs = (
            ("neg_str", "neg_values"),
            ("pos_str", "pos_values"),
            ("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
            ("logits_hist_data_bar_values", "logits_hist_data_bar_heights"),
            ("neuron_alignment_indices", "neuron_alignment_values"),
            ("correlated_features_indices", "correlated_features_pearson"),
        )
        for one, other in pairs:
            n, m = len(getattr(self, one)), len(getattr(self, other))
            if n != m:
                raise ValueError(f"{one} has {n} entries, {other} has {m}")
        return self


class Feature(Statistics):
    """An atom."""

    feature_index: Count
    n_prompts_total: Count
    n_tokens_in_prompt: Count
    dataset: str
    activations: list[Activation]


class Batch(Strict):
    """A file."""

    model_id: str
    layer: Count
    sae_set: str
    sae_id_suffix: str | None
    features: list[Feature]
