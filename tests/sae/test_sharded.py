"""Training on a mesh is training in one process: the same losses, gradients, weights and statistics, in float64."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.activations import BatchTopK, GroupMax, JumpReLU
from sae.collectives import Group, Wait
from sae.initialise import initialise
from sae.kernels.update import Gradients
from sae.losses import fvu
from sae.matryoshka import Nested
from sae.mesh import BUCKETS, Mesh
from sae.metrics import reconstruction
from sae.model import Autoencoder, Identity, ReLU, TopK
from sae.sharded import latent_axis, part_of
from sae.training import StepConfig, TrainStep
from sae.transcoder import Transcoder
from tests.ranks import Ranks

MESHES = [(2, 1), (1, 2), (2, 2), (1, 4), (1, 8)]
STEPS, FEW_STEPS = 50, 12
CONFIG = StepConfig(mse_scale=1.7, auxk=6, dead_after_tokens=60, clip=None, ema_decay=0.9)


@dataclass(frozen=True)
class Case:
    """A training: its autoencoder, its data, and latents that tie or never fire."""

    n: int = 48
    d: int = 10
    activation: Any = field(default_factory=lambda: TopK(4))
    tied: bool = False
    normalize: bool = False
    config: StepConfig = CONFIG
    rows: int = 32
    steps: int = STEPS
    nested: tuple[int, ...] = ()
    transcodes: bool = False
    every_tying: int = 100
    silent: int = 0
    seed: int = 0

    def whole(self) -> Autoencoder:
        options: dict[str, Any] = {"normalize": self.normalize, "nested": Nested(self.nested)}
        if self.transcodes:
            model: Autoencoder = Transcoder(self.n, 6, self.d - 6, self.activation, skip=True, **options).double()
        else:
            model = Autoencoder(self.n, self.d, self.activation, self.tied, **options).double()
        initialise(model, torch.cat(self.batches()[:4]), torch.Generator().manual_seed(self.seed))
        with torch.no_grad():
            if self.every_tying < self.n:
                # Without a weight their pre-activation is their bias, to the last bit, however products are summed.
                model.encoder.weight[:: self.every_tying] = 0
                model.latent_bias[:: self.every_tying] = 6
            model.latent_bias[self.n - self.silent :] = -1e3
        return model

    def batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = self.steps, self.rows, self.d
        return list(torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1)


CASES = {
    "topk": Case(),
    "topk, clipped, of normalised input": Case(config=replace(CONFIG, clip=0.4), normalize=True),
    "topk, with ties and silent latents": Case(every_tying=5, silent=20),
    "multi-topk, of which some ranks have too few": Case(config=replace(CONFIG, multi_topk_coef=0.125), silent=9),
    "one latent a row": Case(activation=TopK(1), every_tying=7),
    "more latents a row than a rank has": Case(activation=TopK(9)),
    "relu": Case(activation=ReLU(), config=replace(CONFIG, sparsity_coef=0.01)),
    "batch-topk, with ties and silent latents": Case(activation=BatchTopK(4), normalize=True, every_tying=5, silent=20),
    "batch-topk of so few that most groups hold none": Case(activation=BatchTopK(1)),
    "group-max, clipped": Case(activation=GroupMax(8), config=replace(CONFIG, clip=0.4), silent=9),
    "jump-relu": Case(activation=JumpReLU(1.0, 0.5), config=replace(CONFIG, sparsity_coef=0.01, clip=0.4)),
    "nested topk": Case(nested=(5, 31), silent=9),
    "nested batch-topk": Case(activation=BatchTopK(4), nested=(5, 31)),
    "transcoder": Case(transcodes=True, silent=9, config=replace(CONFIG, clip=0.4)),
    "nested batch-topk transcoder": Case(activation=BatchTopK(4), transcodes=True, nested=(5, 31), normalize=True),
    "tied": Case(tied=True, every_tying=6, silent=10),
    "tied, identity behind topk, clipped": Case(
        activation=TopK(8, Identity()), tied=True, config=replace(CONFIG, clip=0.4, multi_topk_coef=0.125)
    ),
}


def trained(mesh: Mesh, case: Case) -> dict[str, Any]:
    """What one rank has after all steps, and the metrics of each."""
    whole = case.whole()
    latents = mesh.held(case.n)
    held = whole.like(len(latents), mesh.tp).double()
    held.load_state_dict({**held.state_dict(), **part_of(whole.tensors(), [latents])})
    train = TrainStep(held, case.config, mesh)
    metrics = []
    for number, x in enumerate(case.batches()):
        found = train.step(x[mesh.dp.share(len(x))], 1e-3 * (1 + number % 3))
        metrics.append({name: float(value) for name, value in found.items()})
    with train.averaged_shard() as shard:
        quality = {name: float(value) for name, value in reconstruction(shard, case.batches()[0], mesh.dp).items()}
        sizes = [shard.config()["n_latents"]]
    with train.averaged() as owned:
        average = {f"average.{name}": tensor.clone() for name, tensor in owned.tensors().items()}
        sizes.append(owned.config()["n_latents"])
    state = {name: tensor.clone() for name, tensor in train.state_dict().items() if name != "dead.bound"}
    return {
        "owned": mesh.owned(case.n),
        "metrics": [*metrics, quality],
        "tensors": {**state, **average},
        "sizes": sizes,
    }


def all_trained(mesh: Mesh, cases: list[Case]) -> list[dict[str, Any]]:
    return [trained(mesh, case) for case in cases]


@cache
def trained_alone(case: Case) -> dict[str, Any]:
    return trained(Mesh(), case)


def assembled(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of the whole autoencoder from those of its ranks; what has no latents must be equal on all."""
    order = torch.tensor([latent for part in parts for owned in part["owned"] for latent in owned]).argsort()
    whole = {}
    for name, tensor in parts[0]["tensors"].items():
        axis = latent_axis(name)
        if axis is not None:
            whole[name] = torch.cat([part["tensors"][name] for part in parts], dim=axis).index_select(axis, order)
            continue
        assert all(torch.equal(part["tensors"][name], tensor) for part in parts)
        whole[name] = tensor
    return whole


def assert_same(case: Case, parts: list[dict[str, Any]]) -> None:
    alone = trained_alone(case)
    for part in parts:
        assert part["sizes"] == [case.n, case.n], "a part says of how many latents the whole is"
        for mine, expected in zip(part["metrics"], alone["metrics"], strict=True):
            assert mine == pytest.approx(expected, rel=1e-10, abs=1e-12)
    found, expected = assembled(parts), assembled([alone])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dp", "tp", "steps"),
    [
        *((*mesh, FEW_STEPS) for mesh in MESHES[:-1]),
        *(pytest.param(*mesh, STEPS, marks=pytest.mark.long) for mesh in MESHES),
    ],
)
def test_a_mesh_trains_as_one_process_does(ranks: Ranks, dp: int, tp: int, steps: int) -> None:
    # On two processors eight ranks take turns, and wait for each other some fifteen times a step.
    chosen = CASES.values() if tp < 8 else [CASES["one latent a row"], CASES["topk, with ties and silent latents"]]
    cases = [replace(case, steps=steps) for case in chosen]
    found = ranks.on_mesh(dp, tp, all_trained, cases)
    for number, case in enumerate(cases):
        assert_same(case, [of_rank[number] for of_rank in found])


def test_the_cases_are_of_all_kinds() -> None:
    """Ties are cut and dead latents revived, even in few steps, or the test above would not see them."""
    silent = trained_alone(replace(CASES["topk, with ties and silent latents"], steps=FEW_STEPS))
    assert max(found["dead"] for found in silent["metrics"][:-1]) > 0.3
    model = CASES["one latent a row"].whole()
    pre_act = model.encode_pre_act(CASES["one latent a row"].batches()[0])
    assert ((pre_act == pre_act.max(dim=1, keepdim=True).values).sum(dim=1) > 1).any()
    clipped = trained_alone(replace(CASES["topk, clipped, of normalised input"], steps=FEW_STEPS))
    assert any(found["grad_norm"] > 0.4 for found in clipped["metrics"][:-1])


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    n = 4 * draw(st.integers(2, 20))
    return Case(
        n=n,
        d=draw(st.integers(2, 12)),
        activation=TopK(draw(st.integers(1, n // 2))),
        normalize=draw(st.booleans()),
        config=replace(CONFIG, auxk=draw(st.integers(0, n)), clip=draw(st.sampled_from([None, 0.1]))),
        rows=2 * draw(st.integers(4, 12)),
        steps=8,
        every_tying=draw(st.integers(1, n)),
        silent=draw(st.integers(0, n // 2)),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.slow
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases=st.lists(drawn_cases(), min_size=8, max_size=8), mesh=st.sampled_from(MESHES[:-1]))
def test_whatever_is_trained(ranks: Ranks, cases: list[Case], mesh: tuple[int, int]) -> None:
    found = ranks.on_mesh(*mesh, all_trained, cases)
    for number, case in enumerate(cases):
        assert_same(case, [of_rank[number] for of_rank in found])


class Recording(Group):
    """Writes down, in order, which exchange was begun and which was waited for; they are counted by kind."""

    def __init__(self, group: Group) -> None:
        super().__init__(group._group)
        self.restart()

    def restart(self) -> None:
        self._begun = {"sum": 0, "gather": 0}
        self.events: list[tuple[str, str, int]] = []

    def begin_sum_to_shares(self, whole: Tensor) -> tuple[Tensor, Wait]:
        out, wait = super().begin_sum_to_shares(whole)
        return out, self._noted("sum", wait)

    def begin_gather_(self, whole: Tensor) -> Wait:
        return self._noted("gather", super().begin_gather_(whole))

    def _noted(self, kind: str, wait: Wait) -> Wait:
        number = self._begun[kind] // len(Gradients._fields)
        self._begun[kind] += 1
        self.events.append((kind, "begun", number))

        def waited() -> None:
            wait()
            self.events.append((kind, "waited for", number))

        return waited

    def since(self) -> list[tuple[str, str, int]]:
        """What happened since it was asked last, without what is said again of a bucket's other tensors."""
        events, self.events = list(dict.fromkeys(self.events)), []
        return events


def exchanged(mesh: Mesh, case: Case) -> list[list[tuple[str, str, int]]]:
    """What one rank exchanges over dp in each step."""
    whole, latents, dp = case.whole(), mesh.held(case.n), Recording(mesh.dp)
    held = Autoencoder(len(latents), case.d, case.activation, case.tied, case.normalize, mesh.tp).double()
    held.load_state_dict({**held.state_dict(), **part_of(whole.tensors(), [latents])})
    train = TrainStep(held, case.config, replace(mesh, dp=dp))
    dp.restart()
    found = []
    for x in case.batches():
        train.step(x[mesh.dp.share(len(x))], 1e-3)
        found.append(dp.since())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.4])
def test_a_bucket_is_on_its_way_while_the_next_is_computed(ranks: Ranks, clip: float | None) -> None:
    """And the new weights still are when the step ends: the next one begins with what needs none."""
    case = Case(steps=2, config=replace(CONFIG, clip=clip))
    of_sums = [("begun", 0)]
    for bucket in range(1, BUCKETS):
        of_sums += [("begun", bucket), ("waited for", bucket - 1)]
    of_sums.append(("waited for", BUCKETS - 1))
    for first, second in ranks.on_mesh(2, 1, exchanged, case):
        assert [(what, bucket) for kind, what, bucket in first if kind == "sum"] == of_sums
        begun = [("gather", "begun", bucket) for bucket in range(BUCKETS)]
        assert [event for event in first if event in begun] == begun
        assert not {("gather", "waited for", bucket) for bucket in range(BUCKETS)} & {*first}
        assert second[:BUCKETS] == [("gather", "waited for", bucket) for bucket in range(BUCKETS)]


def test_the_averaged_shard_is_the_averaged_autoencoder() -> None:
    case = CASES["topk"]
    model = case.whole()
    train = TrainStep(model, case.config)
    x = case.batches()[0]
    for _ in range(3):
        train.step(x, 1e-3)
    with train.averaged_shard() as shard, torch.no_grad():
        assert shard is model
        recons = model(x)[2]
        assert float(reconstruction(shard, x)["fvu"]) == pytest.approx(float(fvu(recons, x)))
