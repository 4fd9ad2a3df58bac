"""The same mathematics on a GPU: equal to the CPU in double precision, exact under ties, resumable."""

import pytest
import torch

from sae.activations import Activation, BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from sae.graphs import Replay
from sae.initialise import initialise
from sae.kernels._rows import MAX_FEATURES
from sae.kernels.decode import decode
from sae.kernels.sampled import sampled_matmul
from sae.kernels.scatter import sparse_t_matmul
from sae.kernels.topk import topk
from sae.model import Autoencoder
from sae.training import StepConfig, TrainStep

pytestmark = pytest.mark.gpu


def trainer(device: str, data: torch.Tensor) -> TrainStep:
    autoencoder = Autoencoder(256, data.shape[1], TopK(8), normalize=True).double()
    scale = initialise(autoencoder, data, torch.Generator().manual_seed(0))
    config = StepConfig(mse_scale=scale, auxk=16, dead_after_tokens=100, clip=1.0, ema_decay=0.9)
    return TrainStep(autoencoder.to(device), config)


def test_training_equals_the_cpu() -> None:
    data = torch.randn(20 * 128, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    on_cpu, on_gpu = trainer("cpu", data), trainer("cuda", data)
    for batch in data.split(128):
        expected = on_cpu.step(batch, 1e-3)
        found = on_gpu.step(batch.cuda(), 1e-3)
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu().double(), value.double(), rtol=1e-6, atol=1e-9)
    assert on_cpu.dead.mask(100).any()
    found = on_gpu.state_dict()
    for name, value in on_cpu.state_dict().items():
        if name == "dead.bound":  # a CPU counts when it has to know
            continue
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("activation", "tied"),
    [(BatchTopK(4), False), (GroupMax(8), False), (JumpReLU(), False), (ReLU(), False), (TopK(8), True)],
)
def test_products_of_dense_latents_are_rounded(
    activation: Activation, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, and change the losses by no more than bfloat16's eight bits do."""
    rounded: list[bool] = []
    product = Autoencoder.encode_pre_act

    def noted(model: Autoencoder, x: torch.Tensor) -> torch.Tensor:
        rounded.append(model.rounds)
        return product(model, x)

    monkeypatch.setattr(Autoencoder, "encode_pre_act", noted)
    data, losses = torch.randn(30 * 256, 64, generator=torch.Generator().manual_seed(1)), []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = Autoencoder(256, 64, activation, tied=tied, normalize=True).to(dtype)
        scale = initialise(model, data, torch.Generator().manual_seed(0))
        train = TrainStep(model.to(device), StepConfig(mse_scale=scale, sparsity_coef=1e-3))
        rounded.clear()
        losses.append(torch.stack([train.step(x.to(device), 1e-3)["loss"].cpu().double() for x in data.split(256)]))
        assert set(rounded) == {device == "cuda"}
        assert not model.rounds
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    assert losses[0][-1] < losses[0][0]


def test_a_resumed_training_goes_on_bit_by_bit() -> None:
    data = torch.randn(20 * 128, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, first = trainer("cuda", data), trainer("cuda", data)
    batches = data.cuda().split(128)
    for batch in batches:
        whole.step(batch, 1e-3)
    for batch in batches[:9]:
        first.step(batch, 1e-3)
    second = trainer("cuda", data)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for batch in batches[9:]:
        second.step(batch, 1e-3)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def uneven(rows: int, seed: int) -> torch.Tensor:
    """Activations of which some directions are large: a third of the latents of `by_kernels` die."""
    return torch.randn(rows, 160, generator=torch.Generator().manual_seed(seed)) / torch.arange(1, 161)


def by_kernels(data: torch.Tensor, graphs: bool = True) -> TrainStep:
    """In float32, with AuxK at work: the path of real trainings."""
    autoencoder = Autoencoder(4096, data.shape[1], TopK(16), normalize=True)
    scale = initialise(autoencoder, data[:4096], torch.Generator().manual_seed(0))
    config = StepConfig(mse_scale=scale, auxk=64, dead_after_tokens=5_000, ema_decay=0.99, graphs=graphs)
    return TrainStep(autoencoder.cuda(), config)


def test_recorded_steps_have_the_bits_of_steps_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """While latents die and the batches change in size, more often than graphs are kept."""
    replayed: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    data = uneven(60 * 1024, seed=5)
    sizes = [1024] * 40 + [size for size in range(100, 100 + 2 * Replay.KEPT) for _ in range(6)] + [1024] * 6
    found = []
    for graphs in (True, False):
        train = by_kernels(data, graphs)
        starts = torch.tensor([0, *sizes]).cumsum(0) % (len(data) - 1024)
        batches = (data[start : start + size].cuda() for start, size in zip(starts.tolist(), sizes, strict=False))
        metrics = [train.step(batch, 3e-4) for batch in batches]
        found.append({name: value.clone() for name, value in train.state_dict().items()})
        found[-1].update({name: torch.stack([m[name] for m in metrics]) for name in metrics[0]})
    assert len(replayed) > len(sizes) / 3
    assert len({id(graph) for graph in replayed}) > Replay.KEPT
    assert len(found[0]["dead"].unique()) > 4
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_two_trainings_of_two_hundred_steps_have_the_same_bits() -> None:
    data = uneven(200 * 1024, seed=3)
    batches = data.cuda().split(1024)
    states = []
    for _ in range(2):
        train = by_kernels(data)
        dead = [train.step(batch, 3e-4)["dead"] for batch in batches]
        states.append({name: value.clone() for name, value in train.state_dict().items()})
    assert torch.stack(dead).max() > 0.05
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_a_resumed_training_by_kernels_goes_on_bit_by_bit() -> None:
    data = uneven(60 * 1024, seed=4)
    batches = data.cuda().split(1024)
    whole, first, second = (by_kernels(data) for _ in range(3))
    for batch in batches:
        whole.step(batch, 3e-4)
    for batch in batches[:31]:
        first.step(batch, 3e-4)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for batch in batches[31:]:
        second.step(batch, 3e-4)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_rows_wider_than_the_kernels_take_are_trained_by_the_twins() -> None:
    """More steps than are launched before a graph would be recorded."""
    n, d, rows = 96, MAX_FEATURES + 1, 64
    data = torch.randn(8 * rows, d, generator=torch.Generator().manual_seed(6))
    losses = []
    for device in ("cpu", "cuda"):
        autoencoder = Autoencoder(n, d, TopK(4), normalize=True)
        scale = initialise(autoencoder, data, torch.Generator().manual_seed(0))
        config = StepConfig(mse_scale=scale, auxk=8, dead_after_tokens=100, ema_decay=0.9)
        train = TrainStep(autoencoder.to(device), config)
        losses.append([float(train.step(batch.to(device), 1e-4)["loss"]) for batch in data.split(rows)])
    # Products and reconstructions in bfloat16 against float32.
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_host_does_not_wait_within_a_step() -> None:
    """Not even where nothing is recorded, once the dead latents are counted ahead."""
    data = uneven(40 * 1024, seed=7)
    train = by_kernels(data, graphs=False)
    *first, second, last = data.cuda().split(1024)
    dead = [train.step(batch, 3e-4)["dead"] for batch in first]
    assert dead[-1] > 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.step(second, 3e-4)
        train.step(last, 3e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_makes_nothing_of_the_size_of_dense_latents() -> None:
    rows, n, d = 32768, 65536, 128
    autoencoder = Autoencoder(n, d, TopK(16)).cuda()
    train = TrainStep(autoencoder, StepConfig(auxk=64, dead_after_tokens=10 * rows, graphs=False))
    x = torch.randn(rows, d, device="cuda")
    train.step(x, 1e-4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train.step(x, 1e-4)
    assert torch.cuda.max_memory_allocated() - before < rows * n  # a quarter of theirs in float32


@pytest.mark.parametrize("levels", [2, 1000])
def test_topk_is_a_stable_sort(levels: int) -> None:
    x = torch.randint(levels, (300, 4096), device="cuda").float()
    values, indices = topk(x, 32)
    expected = x.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :32])
    assert torch.equal(indices, expected.indices[:, :32])


def test_sparse_products_equal_dense_ones() -> None:
    rows, n, d, k = 512, 2000, 96, 16
    values = torch.randn(rows, k, device="cuda", dtype=torch.float64)
    indices = torch.rand(rows, n, device="cuda").argsort(dim=1)[:, :k]
    dense = torch.zeros(rows, n, device="cuda", dtype=torch.float64).scatter_(1, indices, values)
    weight = torch.randn(n, d, device="cuda", dtype=torch.float64)
    grad = torch.randn(rows, d, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(decode(values, indices, weight), dense @ weight)
    torch.testing.assert_close(sampled_matmul(grad, weight, indices), (grad @ weight.T).gather(1, indices))
    torch.testing.assert_close(sparse_t_matmul(values, indices, grad, n), dense.T @ grad)
