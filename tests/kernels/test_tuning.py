"""Which settings a kernel is launched with: shipped, tuned once and kept, or the default."""

import json
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from sae.kernels import dispatch, encode, launches, order, reconstruct, topk, tuning, update
from sae.kernels.launches import OPS, Settings
from sae.kernels.tuning import Tuner

TURING = (7, 5)  # nothing is shipped for it
OP = "product"
every_op = pytest.mark.parametrize("op", OPS)


class Launches:
    """Records how an op is launched; a clock that finds one of the settings fast."""

    def __init__(self, fast: Settings, unable: tuple[Settings, ...] = ()) -> None:
        self.fast, self.unable, self.seen = fast, unable, list[Settings]()

    def launch(self, settings: Settings) -> None:
        if settings in self.unable:
            raise OutOfResources(100, 64, "shared memory")
        self.seen.append(settings)

    def clock(self, work: Callable[[], object]) -> float:
        work()
        return 1.0 if self.seen[-1] == self.fast else 2.0


def refused(settings: Settings) -> None:
    raise AssertionError(f"measured {settings}")


def tuner(folder: Path, launches: Launches) -> Tuner:
    return Tuner(TURING, folder, launches.clock)


@every_op
def test_all_that_is_shipped_is_a_candidate(op: str) -> None:
    of = OPS[op]
    assert launches.H100 in of.shipped
    assert of.default in of.candidates
    assert all(chosen in of.candidates for chosen in of.shipped.values())


@every_op
def test_shipped_settings_are_compiled_for_their_architecture(op: str) -> None:
    compiled = {(tuple(chosen.items()), at) for chosen, architectures in tuning.variants(op) for at in architectures}
    for (major, minor), chosen in OPS[op].shipped.items():
        assert (tuple(chosen.items()), 10 * major + minor) in compiled
        assert (tuple(OPS[op].default.items()), 10 * major + minor) in compiled


@pytest.mark.parametrize("number", range(len(OPS[OP].candidates)))
def test_the_fastest_is_found_once_and_read_by_the_next_process(tmp_path: Path, number: int) -> None:
    fast = OPS[OP].candidates[number]
    first = Launches(fast)
    assert tuner(tmp_path, first).best(OP, (2,), first.launch) == fast
    assert all(candidate in first.seen for candidate in OPS[OP].candidates)
    assert Tuner(TURING, tmp_path, lambda work: math.nan).best(OP, (2,), refused) == fast


def test_each_op_and_shape_has_its_own(tmp_path: Path) -> None:
    for number, (op, shape) in enumerate([(OP, (2,)), (OP, (4,)), ("select", (16,))]):
        fast = OPS[op].candidates[number]
        found = Launches(fast)
        assert tuner(tmp_path, found).best(op, shape, found.launch) == fast
    assert Tuner(TURING, tmp_path, lambda work: math.nan).best(OP, (2,), refused) == OPS[OP].candidates[0]


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    *unable, fits = OPS[OP].candidates
    found = Launches(unable[0], unable=tuple(unable))
    assert tuner(tmp_path, found).best(OP, (2,), found.launch) == fits


@pytest.mark.parametrize("text", ["", "{", "[]", '{"BM": 4}', "\x00\xff", json.dumps({**OPS[OP].default, "BN": 256})])
def test_a_damaged_file_is_measured_anew_and_replaced(tmp_path: Path, text: str) -> None:
    fast = OPS[OP].candidates[1]
    found = Launches(fast)
    tuner(tmp_path, found).best(OP, (2,), found.launch)
    (path,) = tmp_path.iterdir()
    path.write_text(text, encoding="latin-1")
    again = Launches(fast)
    assert tuner(tmp_path, again).best(OP, (2,), again.launch) == fast
    assert again.seen
    assert tuner(tmp_path, again).best(OP, (2,), refused) == fast


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    fast = OPS[OP].candidates[2]
    found = Launches(fast)
    assert tuner(blocked / "below", found).best(OP, (2,), found.launch) == fast
    assert blocked.read_text() == ""


def test_processes_that_measure_at_once_agree(tmp_path: Path) -> None:
    """Each finds another the fastest; all follow the first to write, as later ones do."""
    barrier = threading.Barrier(4, timeout=30)
    chosen: list[Settings] = []

    def one(fast: Settings) -> None:
        found = Launches(fast)

        def launch(settings: Settings) -> None:
            if not found.seen:
                barrier.wait()
            found.launch(settings)

        chosen.append(tuner(tmp_path, found).best(OP, (2,), launch))

    threads = [threading.Thread(target=one, args=(fast,)) for fast in OPS[OP].candidates[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chosen) == 4
    assert all(settings == chosen[0] for settings in chosen)
    assert Tuner(TURING, tmp_path, lambda work: math.nan).best(OP, (2,), refused) == chosen[0]
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_measured_without_a_gpu() -> None:
    with dispatch.interpreter():
        for op in OPS:
            assert tuning.settings(op, torch.zeros(5000, 1), (1,), refused) == OPS[op].default


@pytest.mark.gpu
@every_op
def test_a_shipped_gpu_is_looked_up(op: str) -> None:
    x = torch.zeros(5000, 1, device="cuda")
    shipped = OPS[op].shipped.get(torch.cuda.get_device_capability())
    if shipped is None:
        pytest.skip("nothing is shipped for this GPU")
    assert tuning.settings(op, x, (1,), refused) == shipped


@pytest.mark.gpu
def test_another_gpu_is_measured_on_work_that_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_tuner", lambda device: Tuner(TURING, tmp_path, tuning._milliseconds))
    x, weight = (torch.randn(rows, 64, device="cuda").bfloat16() for rows in (2048, 4096))
    bias = torch.zeros(4096, device="cuda")
    expected = encode.encode_topk(x[:1000], weight, bias, 20)
    assert not list(tmp_path.iterdir())
    found = encode.encode_topk(x, weight, bias, 20)
    assert len(list(tmp_path.iterdir())) == 2
    kept = updated(1100, "cuda")
    monkeypatch.setattr(tuning, "MIN_ROWS", 1)
    monkeypatch.setattr(tuning, "_known", {})
    for mine, theirs in zip(updated(1100, "cuda"), kept, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert len(list(tmp_path.glob("update_wide*"))) == 1
    # Sums of 64 products of order one, rounded to bfloat16 in another order.
    torch.testing.assert_close(found.values[:1000].sort().values, expected.values.sort().values, rtol=2e-2, atol=0)


@pytest.mark.gpu
def test_what_settings_were_tried_on_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_tuner", lambda device: Tuner(TURING, tmp_path, tuning._milliseconds))
    monkeypatch.setattr(tuning, "MIN_ROWS", 1)
    before = torch.cuda.memory_allocated()
    updated(1100, "cuda")
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.cuda.memory_allocated() == before


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def result(op: str, device: str) -> list[torch.Tensor]:
    """What an op gives at sizes that are multiples of no tile."""
    if op == "reconstruct":
        values, indices = drawn(5, 7).relu().to(device), torch.arange(35, device=device).view(5, 7)
        return list(reconstruct.reconstruct(values, indices, drawn(37, 40).to(device), drawn(5, 40).to(device)))
    if op.startswith("update"):
        return updated({"update_narrow": 40, "update": 600, "update_wide": 1100}[op], device)
    if op.startswith("select"):
        x = drawn(3, 301).to(device)
        return list(topk.select(x, topk.group_maxima(x), 9, 301))
    dtype = torch.bfloat16 if op == "bulk_product" else torch.float32
    x, weight = drawn(37, 40).to(device, dtype), drawn(301, 40).to(device, dtype)
    return [t.float() for t in encode.pre_activations(x, weight, drawn(301).to(device))]


def updated(d: int, device: str) -> list[torch.Tensor]:
    """New weights of a few latents, of which one fires on every row."""
    rows, n, k = 70, 7, 2
    indices = torch.stack([torch.zeros(rows), torch.arange(rows) % (n - 1) + 1], dim=1).long()
    sizes = ((n, d), (n,), (n, d))
    moved = update.Latents(*(update.Parameter(*(drawn(*size).abs().to(device) for _ in range(3))) for size in sizes))
    values, error, centred = (drawn(rows, width).to(device) for width in (k, d, d + 1))
    of = update.SparseGradient(
        order.latent_index(indices.to(device), n), values, values, error, centred[:, :d].contiguous(), 0.1
    )
    squares = update.update(moved, of, update.Hyper(torch.tensor([0.1, 1.0, 1.0], device=device)))
    return [squares, moved.encoder.weight, moved.bias.weight, moved.decoder.weight]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "chosen"), [(op, chosen) for op in OPS for chosen in OPS[op].candidates], ids=str)
def test_every_candidate_gives_the_same(op: str, chosen: Settings, device: str) -> None:
    if device == "cpu" and not op.startswith(("product", "reconstruct", "update")):
        pytest.skip("the interpreter knows no warps")
    if op == "bulk_product" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs a GPU with bulk tensor copies")
    with nullcontext() if device == "cuda" else dispatch.interpreter():
        expected = result(op, device)
        with tuning.forced("select_few" if op.startswith("select") else op, chosen):
            found = result(op, device)
    for mine, theirs in zip(found, expected, strict=True):
        # Sums of 40 products in another order; those of bulk copies are rounded to bfloat16.
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if op == "bulk_product" else 1e-5, atol=1e-5)


def test_no_program_writes_beyond_the_padded_output() -> None:
    for op in ("product", "bulk_product"):
        for chosen in OPS[op].candidates:
            assert op == "bulk_product" or 128 % chosen["BN"] == 0
            assert chosen["BN"] % topk.GROUP == 0
