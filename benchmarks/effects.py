"""Tokens per second of effects beside the subject's own forward, at the same batch.

Both take turns in one process. Forward: contexts from tokens to logits. Effects: examples, several to a context and at
positions drawn uniformly, with everything that `sae effects` computes of them: the clean runs, the runs from the hook
on, the unembedding of later positions, losses, KL and votes; every position of an example counts as a token. Weights of
the autoencoder are drawn: what they are changes no time. Rates are of the median time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import profile

from benchmarks._report import machine
from sae.activations import TopK
from sae.effects import Ablation, Examples
from sae.model import Autoencoder
from sae.onward import Onward
from sae.subject import DTYPES, Subject

TARGET = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--hook", default="blocks.4.hook_resid_pre")
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="contexts, and examples, that the subject runs at once")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shared", type=int, nargs="+", default=[1, 4], help="examples of each context")
    parser.add_argument("--batches", type=int, default=1, help="of examples, in a sample")
    parser.add_argument("--votes", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="show where the time of effects goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = Subject.load(args.model, args.hook, dtype=args.dtype, device=args.device)
    torch.manual_seed(0)
    autoencoder = Autoencoder(args.latents, subject.d_model, TopK(args.k), normalize=True).to(args.device)
    ablation = Ablation(Onward(subject), autoencoder.requires_grad_(False), args.votes, args.batch)
    rows = [row(args, subject, ablation, autoencoder, shared) for shared in args.shared]
    if args.json:
        about = {"benchmark": "effects", "machine": machine(torch.device(args.device)), **vars(args)}
        print(json.dumps({**about, "target": TARGET, "rows": rows}))


def row(
    args: argparse.Namespace, subject: Subject, ablation: Ablation, autoencoder: Autoencoder, shared: int
) -> dict[str, float]:
    n_examples = args.batch * max(args.batches, shared)
    generator = torch.Generator().manual_seed(shared)
    ids = torch.randint(subject.vocab_size, (n_examples // shared, args.context), generator=generator)
    examples = active_examples(subject, autoencoder, ids, shared, generator)
    lengths = torch.full((len(ids),), args.context)

    def effects() -> None:
        for _ in ablation.effects(ids, lengths, examples):
            pass

    @torch.no_grad()
    def forward() -> None:
        for part in ids[: args.batch].split(args.batch):
            subject.bridge(subject.padded(part), return_type="logits", use_cache=False)

    if args.profile:
        with profile() as profiler:
            effects()
        key = f"self_{subject.device.type}_time_total" if subject.device.type == "cpu" else "self_device_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))
    forward_s, effects_s = medians([forward, effects], args.rounds, subject.device)
    of_forward = min(args.batch, len(ids)) * args.context / forward_s
    of_effects = n_examples * args.context / effects_s
    found = {"shared": shared, "forward_tok_s": of_forward, "effects_tok_s": of_effects}
    found["ratio"] = round(of_effects / of_forward, 3)
    print("  ".join(f"{key}={value:,.5g}" for key, value in found.items()), flush=True)
    return found


@torch.no_grad()
def active_examples(
    subject: Subject, autoencoder: Autoencoder, ids: torch.Tensor, shared: int, generator: torch.Generator
) -> Examples:
    """Some of each context, at drawn positions, each of a latent that is active there."""
    pos = torch.randint(ids.shape[1], (len(ids), shared), generator=generator)
    atoms = []
    for part, at in zip(ids.split(64), pos.split(64), strict=True):
        acts = subject.activations(part)
        x = acts[torch.arange(len(part))[:, None], at].flatten(0, 1).float()
        atoms.append(autoencoder.encode_topk(x)[1][:, 0].cpu())
    context = torch.arange(len(ids)).repeat_interleave(shared)
    return Examples(context, pos.flatten(), torch.cat(atoms))


def medians(works: list[Callable[[], None]], rounds: int, device: torch.device) -> list[float]:
    """Median seconds of each, after a first call that is not counted."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + 1):
        for work, taken in zip(works, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
