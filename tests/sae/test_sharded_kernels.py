"""The kernels train on a mesh, too, as their twins do in one process: gradients that replicas exchange, and copies of
weights that are filled by others, which kernels write beside the masters.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae.initialise import initialise
from sae.kernels.dispatch import interpreter
from sae.mesh import Mesh
from sae.model import Autoencoder, TopK
from sae.sharded import part_of
from sae.training import StepConfig, TrainStep
from tests.ranks import Ranks

N, D, ROWS, STEPS, LR = 32, 8, 8, 3, 0.02
CONFIG = StepConfig(mse_scale=1.7, auxk=6, dead_after_tokens=ROWS, clip=None, ema_decay=0.9)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks here have no GPU, and kernels no interpreter")


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randn(STEPS, ROWS, D, generator=generator, dtype=torch.float64) * 2 + 1)


def whole() -> Autoencoder:
    model = Autoencoder(N, D, TopK(3), normalize=True).double()
    initialise(model, torch.cat(batches()), torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.latent_bias[N - 10 :] = -3
    return model


def trained(mesh: Mesh, config: StepConfig, dtype: torch.dtype) -> list[dict[str, float]]:
    """The metrics of each step: weights of the step before are in them, as every rank sees them."""
    latents = mesh.held(N)
    held = Autoencoder(len(latents), D, TopK(3), normalize=True, tp=mesh.tp).to(dtype)
    held.load_state_dict({**held.state_dict(), **part_of(whole().tensors(), [latents])})
    train = TrainStep(held, config, mesh)
    steps = [train.step(x[mesh.dp.share(ROWS)].to(dtype), LR) for x in batches()]
    return [{name: float(value) for name, value in metrics.items()} for metrics in steps]


def trained_by_kernels(mesh: Mesh, config: StepConfig) -> list[dict[str, float]]:
    with interpreter():
        return trained(mesh, config, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dp", "tp", "options"),
    [(2, 1, {}), (1, 2, {"clip": 0.4, "multi_topk_coef": 0.125})],
)
def test_kernels_on_a_mesh_train_like_their_twins_in_one_process(
    ranks: Ranks, dp: int, tp: int, options: dict[str, float]
) -> None:
    config = replace(CONFIG, **options)  # type: ignore[arg-type]
    expected = trained(Mesh(), config, torch.float64)
    assert expected[-1]["dead"] > 0
    for found in ranks.on_mesh(dp, tp, trained_by_kernels, config):
        for mine, alone in zip(found, expected, strict=True):
            assert mine == pytest.approx(alone, rel=1e-4)  # float32
