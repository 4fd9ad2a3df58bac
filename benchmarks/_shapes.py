"""The sizes that are measured, and what the project asks of one H200 there."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Shape:
    """B rows of d features, n latents of which k are kept; written `B,d,n,k`."""

    batch: int
    d_model: int
    n_latents: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError unless the text is four whole numbers with commas between."""
        return cls(*(int(part) for part in text.split(",", 3)))

    def __str__(self) -> str:
        return f"{self.batch},{self.d_model},{self.n_latents},{self.k}"


SHAPES = (
    Shape(16_384, 768, 32_768, 32),
    Shape(131_072, 768, 32_768, 32),
    Shape(16_384, 768, 131_072, 32),
    Shape(8_192, 4_096, 131_072, 64),
)

# Milliseconds a training step, with no dead latents and with a tenth of them dead.
STEP_TARGETS = {
    "zipf": dict(zip(SHAPES, (4.5, 28.0, 12.0, 32.0), strict=True)),
    "dead": dict(zip(SHAPES, (6.5, 42.0, 20.0, 45.0), strict=True)),
}

# Encoding with exact top-k over the bare product.
ENCODE_TARGETS = dict(zip(SHAPES, (1.5, 1.5, 1.35, 1.12), strict=True))
