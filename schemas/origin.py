"""What exported files were made from: the part that all manifests share."""

from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SIGN_CONVENTION: Final = "ablate_loss_diff = loss(clean) - loss(ablated), in nats: negative where the atom helped"

Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Takes no unknown field, no number for a text, and no number that is not finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Origin(Strict):
    """The autoencoder, its subject and its encoding, at one version of the lake.

    `n_tokens` is the denominator of density and moments: the tokens of `corpora`, without those at the masked
    positions of their contexts. `atoms` is the range that is there, first and last.
    """

    autoencoder: str
    checkpoint: str
    model: str
    hook: str
    masked_positions: list[Count]
    corpora: list[str]
    n_tokens: Count
    trained_tokens: Count
    n_latents: Annotated[int, Field(ge=1)]
    k: Annotated[int, Field(ge=1)]
    bin_width: Annotated[float, Field(gt=0)]
    atoms: tuple[Count, Count]
    sign_convention: str
    lake_version: Count
    versions: dict[str, str]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        first, last = self.atoms
        if not first <= last < self.n_latents:
            raise ValueError(f"atoms are {first} to {last}, of {self.n_latents}")
        return self


class Exported(Origin):
    """`complete` once all files of the folder are there.

    `source` changes when the files would: a second export compares it. `seconds` is how long it took to write them,
    but for what an interrupted export had not noted as done.
    """

    format: str
    complete: bool
    source: str
    seconds: Annotated[float, Field(ge=0)] | None = None
