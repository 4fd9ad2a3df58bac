"""Files of others: damaged, lying or hostile ones give one line, run nothing, and take no memory that they claim."""

import io
import json
import pickle
import pickletools
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sae.activations import TopK
from sae.foreign import FORMATS, About
from sae.jobs import importing, untrusted
from sae.schemas.errors import AutoencoderError, SaeError
from tests.foreign_models import EXPRESSED, KINDS, sparse

_ROOM = 256 << 20  # more than any of these files needs; what they declare is more than any machine has


@contextmanager
def little_memory() -> Iterator[None]:
    """No allocation of more than a little beside what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path: Path, read: Callable[[str], object]) -> str:
    """The one line with which a file is refused."""
    with little_memory(), pytest.raises(SaeError) as caught:
        read(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 600
    assert "allocate" not in message  # that it was tried at all
    return message


def state() -> dict[str, Any]:
    return FORMATS["openai-weights"].write(KINDS["topk-normalized"](), About())[1]


def saved(folder: Path, value: object, **options: Any) -> Path:
    path = folder / "autoencoder.pt"
    torch.save(value, path, **options)
    return path


# What is whole


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_of_torch_is_read_as_torch_reads_it(tmp_path: Path, protocol: int) -> None:
    model = KINDS["topk-normalized"]()
    given: dict[str, Any] = {
        **model.state_dict(),
        "ordered": OrderedDict(a=torch.arange(3), b=1.5, c=None, d=True),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "transposed": torch.randn(3, 4).T,
        "part": torch.arange(10.0)[2:8:2],
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "bits": torch.tensor([True, False]),
        "half": torch.randn(3).bfloat16(),
        "large": 1 << 40,
    }
    path = saved(tmp_path, given, pickle_protocol=protocol)
    expected, found = torch.load(path, weights_only=protocol == 2), untrusted.read_torch(str(path))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        for key, one in inner:
            other = found[name][key] if isinstance(value, dict) else found[name]
            if isinstance(one, Tensor):
                assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
                assert torch.equal(one, other)
            else:
                assert one == other


def test_tensors_that_share_their_bytes_share_them_still(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    found = untrusted.read_torch(str(saved(tmp_path, {"a": weight, "b": weight.T})))
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert torch.equal(found["a"], found["b"].T)


def test_a_module_s_own_state_dict_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    found = untrusted.read_torch(str(saved(tmp_path, module.state_dict())))
    assert torch.equal(found["weight"], module.weight)


# Code in a pickle

RAN: list[str] = []


def run(text: str) -> None:
    RAN.append(text)


class Calls:
    """What a pickle of it would call when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


HOSTILE: dict[str, Callable[[], object]] = {
    "a function": lambda: {"encoder.weight": Calls(run, "x")},
    "a function in place of a dict": lambda: Calls(run, "x"),
    "eval": lambda: {"a": Calls(eval, "__import__('tests.jobs.test_untrusted').RAN.append(1)")},
    "memory": lambda: {"a": Calls(bytearray, 1 << 44)},
    "an object": lambda: {"a": torch.nn.Linear(2, 2)},
    "a set": lambda: {"a": {1, 2}},
    "a key that is none": lambda: {1: torch.ones(2)},
    "a key that takes for ever": lambda: {_doubled(): 1},
    "a number that takes for ever": lambda: {"activation": "TopK", "activation_state_dict": {"k": _doubled()}},
    "dicts in dicts": lambda: {"a": {"b": {"c": 1}}},
    "a list": lambda: [torch.ones(2)],
    "nothing": lambda: None,
    "a tensor": lambda: torch.ones(2),
    "a sparse tensor": lambda: {"a": torch.ones(2).to_sparse()},
}


def _doubled() -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(60):
        value = (value, value)
    return value


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, of sparse tensors
def test_code_is_not_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / "autoencoder.pt"
    if "takes for ever" in name:  # also for torch.save
        write_pickle(path, doubling(name))
    else:
        torch.save(HOSTILE[name](), path)
    RAN.clear()
    refused(path, untrusted.read_torch)
    assert RAN == []


def doubling(name: str) -> bytes:
    """A pickle of a few hundred bytes whose value has 2^60 parts: as a key, or as k."""
    begin, opened = b"\x80\x02}", b"(" if "key" in name else b"(X\x15\0\0\0activation_state_dict}(X\x01\0\0\0k"
    middle = b")" + b"q\x00h\x00\x86" * 60
    return begin + opened + middle + (b"K\x01u." if "key" in name else b"uu.")


def write_pickle(path: Path, data: bytes, parts: dict[str, bytes] | None = None) -> None:
    """An archive as torch.save writes it, of a pickle and of tensors' bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, part in {**(parts or {}), "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", part)


Shape = tuple[int, ...]


def declared(numel: int, shape: Shape, stride: Shape, offset: int = 0, kind: str = "Float") -> bytes:
    """A pickle of {"a": tensor} that declares it so."""
    bytes_of_it = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            storage = getattr(torch, f"{kind}Storage")
            return ("storage", storage, "0", "cpu", numel) if value is bytes_of_it else None

    class Tensor_:
        def __reduce__(self) -> Any:
            arguments: Any = bytes_of_it, offset, shape, stride, False, OrderedDict()
            return torch._utils._rebuild_tensor_v2, arguments

    data = io.BytesIO()
    Pickler(data, protocol=2).dump({"a": Tensor_()})
    return data.getvalue()


def test_a_tensor_that_is_declared_as_it_is_is_read(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", declared(4, (2, 2), (2, 1)), {"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert untrusted.read_torch(str(tmp_path / "a.pt"))["a"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("pickled", "expected"),
    [
        (declared(1 << 40, (1 << 20, 1 << 20), (1 << 20, 1)), "its part data/0 has 16 bytes, of 4,398,046,511,104"),
        (declared(1 << 62, (1,), (1,)), "its data.pkl has a size that is none"),
        (declared(-4, (1,), (1,)), "its data.pkl has a size that is none"),
        (declared(2, (2,), (1,)), "its part data/0 has 16 bytes, of 8 that are declared"),
        (declared(4, (1 << 20, 1 << 20), (0, 0)), r"declares a tensor of shape \[1048576, 1048576\] of 4 numbers"),
        (declared(4, (2, 2), (4, 1)), r"declares a tensor of shape \[2, 2\] of 4 numbers"),
        (declared(4, (2,), (-1,), 3), "its data.pkl has a size that is none"),
        (declared(4, (4,), (1,), 1), r"declares a tensor of shape \[4\] of 4 numbers"),
        (declared(4, (4,), (1, 1)), "its data.pkl has a tensor whose shape is none"),
        (declared(2, (2,), (1,), kind="ComplexFloat"), "its data.pkl has tensors of torch ComplexFloatStorage"),
    ],
)
def test_tensors_larger_than_their_bytes_are_refused(tmp_path: Path, pickled: bytes, expected: str) -> None:
    path = tmp_path / "a.pt"
    write_pickle(path, pickled, {"data/0": b"\0" * 16})
    with pytest.raises(AutoencoderError, match=expected):
        untrusted.read_torch(str(path))
    refused(path, untrusted.read_torch)


def test_a_text_as_python_2_wrote_it_is_refused_without_a_warning(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", b"S'\\o'\n.")
    assert "has the opcode STRING, which no state dict needs" in refused(tmp_path / "a.pt", untrusted.read_torch)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", declared(4, (2, 2), (2, 1)))
    assert "its part data/0 is missing" in refused(tmp_path / "a.pt", untrusted.read_torch)


def test_compressed_parts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", declared(1 << 26, (1 << 26,), (1,)))
        archive.writestr("archive/data/0", b"\0" * (1 << 28))
    assert "is compressed" in refused(path, untrusted.read_torch)


def test_a_directory_of_many_parts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"archive/data/{number:08}", b"")
    assert "its directory has" in refused(path, untrusted.read_torch)


def test_a_large_archive_s_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of more than 4 GB, as this one says it is; and one that says what is not so."""
    path = saved(tmp_path, state())
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "large.pt", "w") as large:
        for name in archive.namelist():
            large.writestr(name, archive.read(name))
    data = (tmp_path / "large.pt").read_bytes()
    assert b"PK\6\7" in data[-42:]
    assert untrusted.read_torch(str(tmp_path / "large.pt")).keys() == state().keys()
    for start, stop, value in ((-34, -26, 1 << 60), (-98 + 40, -98 + 48, 1 << 40)):
        lying = bytearray(data)
        lying[start : stop or None] = value.to_bytes(8, "little")
        (tmp_path / "lying.pt").write_bytes(lying)
        refused(tmp_path / "lying.pt", untrusted.read_torch)


def test_overlapping_parts_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(1 << 12), "b": torch.ones(1 << 12)})
    data = path.read_bytes()
    offsets = [at for at in range(len(data)) if data.startswith(b"PK\1\2", at)]
    lying = bytearray(data)
    for at in offsets:  # each part begins at the first and is as large as the file
        lying[at + 20 : at + 28] = struct.pack("<II", len(data) // 2, len(data) // 2)
    path.write_bytes(lying)
    assert "its parts are larger than the whole" in refused(path, untrusted.read_torch)


def test_bytes_of_a_big_endian_machine_are_refused(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", declared(4, (4,), (1,)), {"data/0": b"\0" * 16, "byteorder": b"big"})
    assert "big-endian" in refused(tmp_path / "a.pt", untrusted.read_torch)


def test_files_from_before_torch_1_6_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, state(), _use_new_zipfile_serialization=False)
    assert "is no file of torch.save since version 1.6" in refused(path, untrusted.read_torch)


# Damage of any kind

CORRUPTIBLE = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Of each format the files of a small autoencoder."""
    made: dict[str, dict[str, Path]] = {}
    for name, format_ in FORMATS.items():
        folder = tmp_path_factory.mktemp(name)
        kind = {"openai-weights": "topk-normalized"}.get(name, "topk")
        config, tensors = format_.write(KINDS[kind](), About())
        made[name] = {format_.weights: folder / format_.weights}
        if not format_.has_config:
            torch.save(tensors, folder / format_.weights)
            continue
        save_file(tensors, folder / format_.weights)
        made[name]["cfg.json"] = folder / "cfg.json"
        (folder / "cfg.json").write_text(json.dumps(config))
    return made


def read_as(format_: str, files: dict[str, Path]) -> object:
    with untrusted.blamed("x"):
        return importing.read(FORMATS[format_], {name: str(path) for name, path in files.items()})


@pytest.mark.parametrize("format_", FORMATS)
def test_whole_files_are_read(format_: str, files: dict[str, dict[str, Path]]) -> None:
    with little_memory():
        read_as(format_, files[format_])


def damaged_read(format_: str, files: dict[str, Path], name: str, data: bytes, folder: Path) -> None:
    """A damaged file is refused in one line, or still means the same kind of thing; nothing else is raised."""
    (folder / name).write_bytes(data)
    one_line_at_most(lambda: read_as(format_, {**files, name: folder / name}))


def one_line_at_most(read: Callable[[], object]) -> None:
    message = ""
    try:
        with little_memory():
            read()
    except SaeError as error:
        message = str(error)
    assert "\n" not in message
    assert "allocate" not in message


@pytest.mark.parametrize("format_", FORMATS)
@settings(suppress_health_check=CORRUPTIBLE)
@given(data=st.data())
def test_a_file_that_was_cut_off_is_refused(
    format_: str, files: dict[str, dict[str, Path]], tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(files[format_])))
    whole = files[format_][name].read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with little_memory(), pytest.raises(SaeError) as caught:
        read_as(format_, {**files[format_], name: path})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format_", FORMATS)
@settings(suppress_health_check=CORRUPTIBLE, max_examples=150)
@given(data=st.data())
def test_changed_bytes_give_one_line_at_most(
    format_: str, files: dict[str, dict[str, Path]], tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(files[format_])))
    changed = bytearray(files[format_][name].read_bytes())
    # Headers, the pickle and directories lie at both ends.
    anywhere = st.one_of(
        st.integers(0, min(1200, len(changed) - 1)),
        st.integers(max(0, len(changed) - 1500), len(changed) - 1),
        st.integers(0, len(changed) - 1),
    )
    for at in data.draw(st.lists(anywhere, min_size=1, max_size=6)):
        changed[at] = data.draw(st.integers(0, 255))
    damaged_read(format_, files[format_], name, bytes(changed), tmp_path)


@settings(suppress_health_check=CORRUPTIBLE, max_examples=200)
@given(data=st.data())
def test_any_pickle_gives_one_line_at_most(tmp_path: Path, data: st.DataObject) -> None:
    """Of opcodes of the state dict's own and of all others, in any order, with the numbers that they take."""
    opcodes = st.sampled_from(pickletools.opcodes)
    known = data.draw(st.binary(max_size=40))
    pieces = data.draw(st.lists(st.tuples(opcodes, st.binary(max_size=9)), max_size=20))
    pickled = b"\x80\x02" + known + b"".join(op.code.encode("latin-1") + argument for op, argument in pieces) + b"."
    path = tmp_path / "a.pt"
    write_pickle(path, pickled)
    one_line_at_most(lambda: untrusted.read_torch(str(path)))


@settings(suppress_health_check=CORRUPTIBLE, max_examples=150)
@given(data=st.data())
def test_a_changed_pickle_gives_one_line_at_most(
    files: dict[str, dict[str, Path]], tmp_path: Path, data: st.DataObject
) -> None:
    """With the archive around it whole, so that the pickle itself is read."""
    with zipfile.ZipFile(files["openai-weights"]["autoencoder.pt"]) as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    pickled = bytearray(parts.pop("data.pkl"))
    for _ in range(data.draw(st.integers(1, 5))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "autoencoder.pt"
    write_pickle(path, bytes(pickled), parts)
    damaged_read("openai-weights", {}, path.name, path.read_bytes(), tmp_path)


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one_tensor(**changes: Any) -> dict[str, Any]:
    return {"W_enc": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        safetensors({}, length=1 << 62),
        safetensors({}, length=(1 << 64) - 1),
        safetensors({}, length=1 << 20),
        safetensors(b"{" + b'"a":{' * 5000),
        safetensors(b"[" * 100_000),
        safetensors(b" " * (2 << 20), b"\0" * 16),
        safetensors(one_tensor(shape=[1 << 40, 1 << 40]), b"\0" * 16),
        safetensors(one_tensor(shape=[1 << 62, 4]), b"\0" * 16),
        safetensors(one_tensor(shape=[1 << 31, 1 << 31], data_offsets=[0, 1 << 64]), b"\0" * 16),
        safetensors(one_tensor(data_offsets=[0, 1 << 50]), b"\0" * 16),
        safetensors(one_tensor(data_offsets=[16, 0]), b"\0" * 16),
        safetensors(one_tensor(dtype="F33"), b"\0" * 16),
        safetensors(one_tensor(dtype="F64"), b"\0" * 16),
        safetensors(one_tensor(shape=[-1, 4]), b"\0" * 16),
        safetensors(one_tensor(), b"\0" * 8),
        safetensors({**one_tensor(), "b": one_tensor()["W_enc"]}, b"\0" * 16),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(data)
    refused(path, untrusted.read_safetensors)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "damaged, or of another kind"),
        (b"{", "damaged, or of another kind"),
        (b"\xff\xfe", "damaged, or of another kind"),
        (b"[1, 2]", "holds list: expected an object of JSON"),
        (b"[" * 200_000, "damaged, or of another kind"),
        (b'{"a":' * 100_000, "damaged, or of another kind"),
        (b'{"d_in": ' + b"9" * 10_000 + b"}", "damaged, or of another kind"),
        (b" " * (2 << 20), "it has 2,097,152 bytes, of which an autoencoder's has a few thousand"),
    ],
)
def test_configs_that_are_none_are_refused(tmp_path: Path, text: bytes, expected: str) -> None:
    path = tmp_path / "cfg.json"
    path.write_bytes(text)
    assert expected in refused(path, untrusted.read_json)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "architecture", "d_in", "d_sae", "d_out", "k", "apply_b_dec_to_input", "normalize_activations", "metadata",
    "matryoshka_widths", "activation", "num_latents", "expansion_factor", "transcode", "skip_connection",
    "activation_fn", "activation_fn_kwargs", "reshape_activations", "rescale_acts_by_decoder_norm",
)  # fmt: skip


@pytest.mark.parametrize("format_", ["saelens", "sparsify"])
@settings(suppress_health_check=CORRUPTIBLE, max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(1, 1 << 70), min_size=1, max_size=3))
def test_any_config_gives_one_line_at_most(
    format_: str, files: dict[str, dict[str, Path]], tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = {**json.loads(files[format_]["cfg.json"].read_text()), **changes}
    damaged_read(format_, files[format_], "cfg.json", json.dumps(config).encode(), tmp_path)


def test_every_kind_that_a_format_has_is_read_from_files(tmp_path: Path) -> None:
    expressed = [(name, kind) for name, kinds in EXPRESSED.items() for kind in kinds]
    for number, (name, kind) in enumerate(expressed):
        config, tensors = FORMATS[name].write(KINDS[kind](), About())
        folder = tmp_path / str(number)
        folder.mkdir()
        paths = {FORMATS[name].weights: folder / FORMATS[name].weights}
        if FORMATS[name].has_config:
            save_file(tensors, paths[FORMATS[name].weights])
            paths["cfg.json"] = folder / "cfg.json"
            paths["cfg.json"].write_text(json.dumps(config))
        else:
            torch.save(tensors, paths[FORMATS[name].weights])
        read_as(name, paths)


def test_what_is_read_is_no_larger_than_its_file(tmp_path: Path) -> None:
    model = sparse(TopK(4), d=64, n=4096, normalize=True)
    path = saved(tmp_path, FORMATS["openai-weights"].write(model, About())[1])
    found = untrusted.read_torch(str(path))
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in found.values() if isinstance(tensor, Tensor)}
    assert sum(sizes.values()) <= path.stat().st_size
