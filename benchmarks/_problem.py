"""What a row of the step benchmark is about: its batches, where training starts, and who trains."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks._inputs import HOT, Dictionary, add_hot, autoencoder, isolate_hot, kill
from benchmarks._shapes import Shape
from sae.model import Autoencoder

# More than the L2 cache holds, together with what a step writes.
BATCHES = 4
# Small, so that the dead stay dead and the living keep their share; it changes no time.
LR = 1e-5
R = TypeVar("R")
CASES = ("zipf", "dead", "hot")


@dataclass(frozen=True)
class Problem:
    """Several batches of one shape, and the start of every contender's training, which is the same each time."""

    shape: Shape
    case: str
    batches: list[Tensor]
    sample: Tensor
    seed: int
    normalize: bool

    @classmethod
    def draw(cls, shape: Shape, case: str, seed: int, device: torch.device, normalize: bool) -> "Problem":
        dictionary = Dictionary(shape.d_model, shape.k, torch.Generator(device).manual_seed(2 * seed))
        batches = [dictionary.draw(shape.batch) for _ in range(BATCHES)]
        # The pre-bias is made from a batch before the hot direction is added: it would take that latent's place.
        problem = cls(shape, case, batches, batches[0], seed, normalize)
        if case == "hot":
            direction = isolate_hot(problem.start())
            batches[:] = [add_hot(batch, direction) for batch in batches]
        return problem

    def start(self) -> Autoencoder:
        generator = torch.Generator(self.sample.device).manual_seed(2 * self.seed + 1)
        model = autoencoder(self.shape, self.sample, generator, self.normalize)
        if self.case == "dead":
            kill(model, generator)
        elif self.case == "hot":
            isolate_hot(model)
        return model

    def hot_share(self, model: Autoencoder) -> float:
        """Share of tokens on which the hot latent fires."""
        fired = model.nonzeros(self.batches[0].float()).latent == HOT
        return int(fired.sum()) / len(self.batches[0])


def training(step: Callable[[Tensor, float], R], problem: Problem) -> Callable[[], R]:
    """Each call is a training step on the next batch."""
    batches = cycle(problem.batches)
    return lambda: step(next(batches), LR)
