"""Does training by the kernels come out where the plain twins come out? Both train on the same batches of given
activations, from the same start; the held-out FVU of their averaged weights is compared.

FILE.npy holds activations [m, d], as `sae harvest` keeps them, the last tenth of which is held out.
"""

import argparse
import sys

import numpy as np
import torch
from torch import Tensor

from benchmarks import _options
from benchmarks._twins import twins
from sae.activations import TopK
from sae.initialise import initialise
from sae.metrics import reconstruction
from sae.model import Autoencoder
from sae.training import StepConfig, TrainStep

TOLERANCE = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("activations", metavar="FILE.npy")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device = _options.device(args.device)
    x = torch.from_numpy(np.load(args.activations).astype(np.float32)).to(device)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)]
    held_out, rows = x[: len(x) // 10], x[len(x) // 10 :]
    ours = trained(rows, held_out, args)
    with twins():
        plain = trained(rows, held_out, args)
    apart = abs(ours["fvu"] / plain["fvu"] - 1)
    for name, found in (("kernels", ours), ("plain twins", plain)):
        print(f"{name}: " + ", ".join(f"{metric} {value:.5f}" for metric, value in found.items()))
    print(f"after {args.steps} steps the FVU is {apart:.3%} apart; at most {TOLERANCE:.1%} is allowed")
    sys.exit(apart > TOLERANCE)


def trained(rows: Tensor, held_out: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Held-out quality after training, and the share of dead latents at the end."""
    model = Autoencoder(args.latents, rows.shape[1], TopK(args.k), normalize=True).to(rows.device)
    scale = initialise(model, rows[:32768], torch.Generator().manual_seed(1))
    train = TrainStep(model, StepConfig(mse_scale=scale, dead_after_tokens=50 * args.batch))
    generator = torch.Generator().manual_seed(2)
    metrics = {}
    for _ in range(args.steps):
        chosen = torch.randint(len(rows), (args.batch,), generator=generator).to(rows.device)
        metrics = train.step(rows[chosen], args.lr)
    with train.averaged_shard() as shard:
        quality = reconstruction(shard, held_out)
    return {name: float(value) for name, value in {**quality, "dead": metrics["dead"]}.items()}


if __name__ == "__main__":
    main()
