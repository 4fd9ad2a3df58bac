"""Files of others: nothing in them is run, and what they declare is allocated only where they hold as much.

A file of torch is a zip archive of a pickle and the bytes of its tensors. The pickle is not unpickled: what the
published format needs of its opcodes is interpreted here, over plain values.
"""

import json
import math
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.jobs import storage
from sae.schemas.errors import AutoencoderError, SaeError

_TEXT_BYTES: Final = 1 << 20  # of a config, a header or a pickle; those of an autoencoder have a few thousand
_PART: Final = 16 << 20
_END: Final = 22  # bytes of the record that ends a zip archive, and of the one before it in a large one
_LOCATOR: Final = 20
_END_64: Final = 56
_TYPES: Final = {
    f"torch {name}Storage": getattr(torch, dtype)
    for name, dtype in {
        "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    }.items()
}  # fmt: skip


@contextmanager
def blamed(path: str) -> Iterator[None]:
    """Whatever a file that is not what it should be makes of its reader, in one line."""
    try:
        yield
    except SaeError as error:
        raise type(error)(str(error) if str(error).startswith(path) else f"{path}: {error}") from None
    except (
        SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, LookupError, TypeError, AttributeError,
        ArithmeticError, RecursionError, RuntimeError, NotImplementedError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise AutoencoderError(f"{path}: damaged, or of another kind ({reason}); fetch or save it anew") from None


def read_json(path: str) -> dict[str, Any]:
    """An object of JSON, of at most 1 MiB; raises AutoencoderError for anything else."""
    with blamed(path):
        _check_text(storage.size(path), "it")
        found = json.loads(storage.read_bytes(path).decode("utf-8"))
        if not isinstance(found, dict):
            raise AutoencoderError(f"holds {type(found).__name__}: expected an object of JSON")
        return found


def _check_text(n_bytes: int, what: str) -> None:
    if n_bytes > _TEXT_BYTES:
        raise AutoencoderError(f"{what} has {n_bytes:,} bytes, of which an autoencoder's has a few thousand")


def read_safetensors(path: str) -> dict[str, Tensor]:
    """All tensors of a local file; raises AutoencoderError where it is not whole."""
    with blamed(path):
        n_bytes = storage.size(path)
        if n_bytes < 8:
            raise AutoencoderError(f"has {n_bytes} bytes: no header of safetensors")
        n_header = int.from_bytes(storage.read_range(path, 0, 8), "little")
        if n_header > n_bytes - 8:
            raise AutoencoderError(f"its header has {n_header:,} bytes, the whole file {n_bytes:,}: it was cut off")
        _check_text(n_header, "its header")
        # The library compares shapes, types and places with the file's size before it makes any tensor.
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_torch(path: str) -> dict[str, Any]:
    """The state dict in a local file of torch.save; raises AutoencoderError where it is not whole, or has code in it.

    Tensors that share their bytes there share them here.
    """
    with blamed(path):
        n_bytes = storage.size(path)
        _check_directory(path, n_bytes)
        with storage.open_read(path) as file, zipfile.ZipFile(file) as archive:
            return _Archive(archive, n_bytes).state()


def _check_directory(path: str, n_bytes: int) -> None:
    """Raises AutoencoderError where the file does not end as torch.save ends it, or in a directory of many parts."""
    tail = storage.read_range(path, max(0, n_bytes - _END - _LOCATOR), n_bytes) if n_bytes else b""
    end = tail[-_END:]
    if len(end) < _END or not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
        raise AutoencoderError(
            "is no file of torch.save since version 1.6, or was cut off; fetch it anew, or save it anew with torch.save"
        )
    n_directory = int.from_bytes(end[12:16], "little")
    if tail.startswith(b"PK\6\7"):
        at = n_bytes - _END - _LOCATOR - _END_64
        if int.from_bytes(tail[8:16], "little") != at:
            raise AutoencoderError("its directory is not where torch.save has it")
        n_directory = int.from_bytes(storage.read_range(path, at, at + _END_64)[40:48], "little")
    _check_text(n_directory, "its directory")


@dataclass(frozen=True)
class _Name:
    """What a pickle names for import, which is not done."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Bytes in an archive."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _View:
    """A tensor that a pickle declares."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Archive:
    def __init__(self, archive: zipfile.ZipFile, n_bytes: int) -> None:
        self._archive = archive
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise AutoencoderError(f"its part {entry.filename[:100]} is compressed: torch.save compresses nothing")
        if sum(entry.file_size for entry in entries) > n_bytes:
            raise AutoencoderError(f"its parts are larger than the whole, {n_bytes:,} bytes")
        self._sizes = {entry.filename: entry.file_size for entry in entries}
        pickles = [name for name in self._sizes if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise AutoencoderError(f"has {len(pickles)} parts data.pkl: a file of torch.save has one")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._storages: dict[_Storage, Tensor] = {}

    def state(self) -> dict[str, Any]:
        if self._read("byteorder", b"little") != b"little":
            raise AutoencoderError("was saved on a big-endian machine; save it anew on a little-endian one")
        _check_text(self._sizes[f"{self._folder}data.pkl"], "its data.pkl")
        found = interpreted(self._read("data.pkl"))
        if not isinstance(found, dict):
            raise AutoencoderError(f"holds {type(found).__name__}: expected a state dict, tensors by name")
        return {
            key: {inner: self._whole(inner, its) for inner, its in value.items()}
            if isinstance(value, dict)
            else self._whole(key, value)
            for key, value in found.items()
        }

    def _whole(self, key: str, value: Any) -> Any:
        """A tensor in the place of what declares it; a number or a text as it is."""
        if isinstance(value, _View):
            return self._tensor(value)
        if value is not None and not isinstance(value, str | int | float):
            raise AutoencoderError(f"has {type(value).__name__} for {key[:100]}: expected a tensor, a number or a text")
        return value

    def _tensor(self, view: _View) -> Tensor:
        whole = self._storages.get(view.storage)
        if whole is None:
            whole = self._storages[view.storage] = self._stored(view.storage)
        numel = math.prod(view.shape)
        last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
        if numel and (numel > len(whole) or last >= len(whole)):
            raise AutoencoderError(f"declares a tensor of shape {list(view.shape)} of {len(whole):,} numbers")
        return torch.as_strided(whole, view.shape, view.stride, view.offset) if numel else whole.new_empty(view.shape)

    def _stored(self, of: _Storage) -> Tensor:
        name, n_bytes = f"data/{of.key}", of.numel * of.dtype.itemsize
        found = self._sizes.get(self._folder + name)
        if found != n_bytes:
            has = "is missing" if found is None else f"has {found:,} bytes"
            raise AutoencoderError(f"its part {name[:100]} {has}, of {n_bytes:,} that are declared")
        if not of.numel:
            return torch.empty(0, dtype=of.dtype)
        return torch.frombuffer(self._read(name), dtype=of.dtype)

    def _read(self, name: str, default: bytes = b"") -> bytearray:
        """A part, whose size is that of the archive's own directory; its checksum is compared."""
        if default and self._folder + name not in self._sizes:
            return bytearray(default)
        data, filled = bytearray(self._sizes[self._folder + name]), 0
        with self._archive.open(self._folder + name) as part:
            while filled < len(data) and (read := part.read(min(_PART, len(data) - filled))):
                data[filled : filled + len(read)] = read
                filled += len(read)
        if filled < len(data):
            raise AutoencoderError(f"its part {name} ends after {filled:,} of {len(data):,} bytes")
        return data


def interpreted(pickle: bytes | bytearray) -> Any:
    """What a pickle of a state dict says: numbers, texts, tuples, lists, dicts, and what its tensors are.

    Raises AutoencoderError where it needs anything else.
    """
    machine = _Machine()
    with warnings.catch_warnings():
        # Of escapes in texts that Python 2 wrote, which are decoded before they can be refused.
        warnings.simplefilter("ignore", DeprecationWarning)
        for opcode, argument, _ in pickletools.genops(bytes(pickle)):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.do(opcode.name, argument)
    raise AutoencoderError("its data.pkl has no end")


class _Machine:
    """The part of a pickle machine that makes plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def do(self, opcode: str, argument: Any) -> None:
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._popped(_TUPLES[opcode])))
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        else:
            raise AutoencoderError(f"its data.pkl has the opcode {opcode}, which no state dict needs: nothing was run")

    def _popped(self, n: int) -> list[Any]:
        if n > len(self.stack) - (self._marks[-1] if self._marks else 0):
            raise AutoencoderError("its data.pkl takes more than it has")
        values = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return values

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def mark(self, _: Any) -> None:
        self._marks.append(len(self.stack))

    def put(self, argument: int | None) -> None:
        self._memo[len(self._memo) if argument is None else argument] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self._memo[argument])

    def tuple_(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def append(self, values: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(values)

    def set_items(self, values: list[Any]) -> None:
        # Texts alone: to hash tuples within tuples can take for ever.
        keys = [_of(str, key) for key in values[::2]]
        _of(dict, self.stack[-1]).update(zip(keys, values[1::2], strict=True))

    def name(self, argument: str) -> None:
        self.stack.append(_Name(argument))

    def stack_name(self, _: Any) -> None:
        module, name = self._popped(2)
        self.stack.append(_Name(f"{_of(str, module)} {_of(str, name)}"))

    def stored(self, _: Any) -> None:
        kind, type_, key, _device, numel = self._popped(1)[0]
        dtype = _TYPES.get(_of(_Name, type_).name)
        if kind != "storage" or dtype is None:
            raise AutoencoderError(f"its data.pkl has tensors of {type_.name[:100]}, which no autoencoder has")
        self.stack.append(_Storage(dtype, _of(str, key), _natural(numel)))

    def call(self, _: Any) -> None:
        name, arguments = self._popped(2)
        called = _CALLS.get(_of(_Name, name).name)
        if called is None:
            raise AutoencoderError(f"its data.pkl calls {name.name[:100]}, which no state dict needs: it was not run")
        self.stack.append(called(*_of(tuple, arguments)))

    def build(self, _: Any) -> None:
        # The state of an ordered dict, which is dropped: the versions of its modules.
        self._popped(1)
        _of(dict, self.stack[-1])


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise AutoencoderError(f"its data.pkl has {type(value).__name__} where a state dict has {kind.__name__}")
    return value


def _natural(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 48:
        raise AutoencoderError("its data.pkl has a size that is none")
    return value


def _view(storage_: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _View:
    sizes, steps = (tuple(map(_natural, _of(tuple, given))) for given in (shape, stride))
    if len(sizes) != len(steps) or len(sizes) > 8:
        raise AutoencoderError("its data.pkl has a tensor whose shape is none")
    return _View(_of(_Storage, storage_), _natural(offset), sizes, steps)


_CONSTANTS: Final[dict[str, Callable[[], Any]]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
}  # fmt: skip
_LITERALS: Final = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STEPS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_,
    "APPEND": lambda machine, _: machine.append(machine._popped(1)),
    "APPENDS": lambda machine, _: machine.append(machine._since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine._popped(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine._since_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "BINPERSID": _Machine.stored,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
_CALLS: Final[dict[str, Callable[..., Any]]] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": _view,
    "torch._utils _rebuild_parameter": lambda data, *_: _of(_View, data),
}
