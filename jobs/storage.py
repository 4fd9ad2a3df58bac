"""Files, local or in an object store: the one module that opens paths.

A path is a string: a local path, `s3://bucket/key`, `gs://bucket/name` or `az://account/container/name`.
blobfile serves local files, gs:// and az://; obstore serves s3:// (credentials and endpoint: the AWS_*
environment variables). Reading works everywhere; writing is for local folders, where a file is complete from
the moment that its name is visible.
"""

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, cast

import blobfile
import obstore
from obstore.exceptions import BaseError as ObstoreError
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from sae.schemas.errors import StorageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TEMPORARY_PREFIX = ".tmp-"
_STORES = ("s3", "gs", "az")
_S3_BUFFER = 4 << 20
_WILDCARD = re.compile(r"[*?]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
    "": "grant this user access to it",
}
_WRITE_REMEDIES = {
    errno.ENOSPC: "free some space or use another disk",
    errno.EDQUOT: "raise the quota or use another disk",
    errno.EFBIG: "raise the limit on file sizes or use another disk",
    errno.EROFS: "use a folder on a writable disk",
    errno.EACCES: "use a folder that this user may write to",
    errno.EPERM: "use a folder that this user may write to, on a disk that has hard links",
    errno.ENOTSUP: "use a disk that has hard links",
    errno.ENOTDIR: "use a path whose parents are all folders",
    errno.EISDIR: "use a path that is not a folder",
    errno.ENAMETOOLONG: "use a shorter path",
}

# Without a limit blobfile retries for ever; by default it prints what it logs.
_blobs: blobfile.Context = blobfile.create_context(
    retry_limit=8, log_callback=logging.getLogger(__name__).info, save_access_token_to_disk=False
)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file and its size in bytes."""

    path: str
    size: int


# Paths


def scheme(path: str) -> str:
    """Return "s3", "gs", "az", or "" for a local path.

    Raises:
        StorageError: another scheme.
    """
    match = _SCHEME.match(path)
    if match and match[1] not in _STORES:
        raise StorageError(f"{path}: unknown scheme {match[1]}://; use a local path, s3://, gs:// or az://")
    return match[1] if match else ""


def is_local(path: str) -> bool:
    """Tell whether `path` is in the local file system."""
    return scheme(path) == ""


def join(base: str, *parts: str) -> str:
    """Join `parts` to `base` with single slashes; a part never replaces the base."""
    for part in parts:
        base = f"{base.rstrip('/')}/{part.lstrip('/')}" if base else part
    return base


# Reading


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a store raises while `path` is read into a StorageError that names it."""
    try:
        yield
    except IsADirectoryError as error:
        raise StorageError(f"{path}: is a folder, a file was expected") from error
    except (PermissionError, PermissionDeniedError, UnauthenticatedError) as error:
        raise StorageError(f"{path}: permission denied; {_CREDENTIALS[scheme(path)]}") from error
    except (FileNotFoundError, ObstoreError, blobfile.Error) as error:
        if _is_missing(error):
            raise StorageError(f"{path}: no such file, folder or bucket; check the path") from error
        hint = f"check the path, the network and the credentials: {_CREDENTIALS[scheme(path)]}"
        raise StorageError(f"cannot read {path}: {_one_line(error)}; {hint}") from error
    except OSError as error:
        if error.errno is None:  # a decoder's complaint about the contents, not the system's
            raise
        raise StorageError(f"cannot read {path}: {os.strerror(error.errno)}") from error


def open_read(path: str) -> BinaryIO:
    """Open a file for reading in a stream; seekable, never downloaded whole.

    Errors later in the stream are the store's own: read inside `reading(path)`.

    Raises:
        StorageError: the file cannot be opened.
    """
    with reading(path):
        if scheme(path) == "s3":
            return cast(BinaryIO, io.BufferedReader(_S3File(path), _S3_BUFFER))
        return _blobs.BlobFile(path, "rb", streaming=True)


def read_bytes(path: str) -> bytes:
    """Read a whole file."""
    with open_read(path) as file, reading(path):
        return file.read()


def sha256(path: str) -> str:
    """Hash a file, streaming; hexadecimal."""
    with open_read(path) as file, reading(path):
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def exists(path: str) -> bool:
    """Tell whether there is a file or a folder at `path`."""
    with reading(path):
        if scheme(path) != "s3":
            return _blobs.exists(path)
        store, key = _s3(path)
        try:
            return _file_size(path) is not None or any(obstore.list(store, key, chunk_size=1))
        except (FileNotFoundError, ObstoreError) as error:
            if not _is_missing(error):
                raise
            return False


def size(path: str) -> int:
    """Return the size of a file in bytes."""
    with reading(path):
        found = _file_size(path)
        if found is None:
            raise FileNotFoundError(path)
        return found


def glob(pattern: str) -> list[str]:
    """Find files by pattern, sorted; see `find`."""
    return [file.path for file in find(pattern)]


def find(pattern: str) -> list[FileInfo]:
    """Find files (never folders) by pattern, sorted by path, the same way in every store.

    `*` and `?` match within one name, `**` as a whole name matches any number of folders; none of them
    matches a leading dot. Every other character stands for itself. A pattern without wildcards finds the
    file of that name. Nothing found is an empty list.

    Raises:
        StorageError: the store or bucket cannot be listed.
    """
    if is_local(pattern):
        pattern = re.sub("/+", "/", pattern)
    with reading(pattern):
        wildcard = _WILDCARD.search(pattern)
        if wildcard is None:
            found = _file_size(pattern)
            return [] if found is None else [FileInfo(pattern, found)]
        regex = _translate(pattern)
        depth = None if "**" in pattern.split("/") else pattern.count("/", wildcard.start()) + 1
        listed = _LISTINGS[scheme(pattern)](pattern[: wildcard.start()], depth)
        return sorted((file for file in listed if regex.fullmatch(file.path)), key=lambda file: file.path)


def _translate(pattern: str) -> re.Pattern[str]:
    *folders, name = pattern.split("/")
    anywhere = r"(?:(?!\.)[^/]+/)*"
    regex = "".join(anywhere if part == "**" else _translate_name(part) + "/" for part in folders)
    return re.compile(regex + (anywhere + _translate_name("*") if name == "**" else _translate_name(name)))


def _translate_name(name: str) -> str:
    wild = {"*": "[^/]*", "?": "[^/]"}
    not_hidden = r"(?!\.)" if name[:1] in wild else ""
    return not_hidden + "".join(wild.get(character, re.escape(character)) for character in name)


def _file_size(path: str) -> int | None:
    try:
        if scheme(path) == "s3":
            return obstore.head(*_s3(path))["size"]
        if scheme(path):
            return _blobs.stat(path).size
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_size


# A listing gives the files whose path begins with `prefix`, at most `depth` names deep (None: any depth). It
# may give more; the pattern decides.


def _list_local(prefix: str, depth: int | None) -> Iterator[FileInfo]:
    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    top = os.path.dirname(prefix)
    # Links to folders are followed as deep as the pattern names; below ** they could form a circle.
    for folder, subfolders, names in os.walk(top or ".", onerror=unreadable, followlinks=depth is not None):
        within = "" if folder == (top or ".") else os.path.relpath(folder, top or ".")
        if depth is not None and len(within.split("/")) + bool(within) >= depth:
            subfolders.clear()
        for name in names:
            path = os.path.join(top, within, name)
            found = _file_size(path)
            if found is not None:  # None: a link that leads nowhere
                yield FileInfo(path, found)


def _list_blobs(prefix: str, depth: int | None) -> Iterator[FileInfo]:
    listable = re.split(r"[\[\]]", prefix)[0]  # blobfile takes no brackets in a pattern, even as themselves
    for entry in _blobs.scanglob(listable + ("*" if depth == 1 and listable == prefix else "**")):
        if entry.is_file and entry.stat is not None:
            yield FileInfo(entry.path, entry.stat.size)


def _list_s3(prefix: str, depth: int | None) -> Iterator[FileInfo]:
    bucket = prefix.split("/")[2]
    store, folder = _s3(prefix[: prefix.rindex("/")] if prefix.count("/") > 2 else prefix)
    if depth == 1:
        pages: Iterable[Iterable[obstore.ObjectMeta]] = [obstore.list_with_delimiter(store, folder or None)["objects"]]
    else:
        pages = obstore.list(store, folder or None)
    for page in pages:
        yield from (FileInfo(f"s3://{bucket}/{meta['path']}", meta["size"]) for meta in page)


_LISTINGS = {"": _list_local, "gs": _list_blobs, "az": _list_blobs, "s3": _list_s3}


@lru_cache(maxsize=64)
def _s3_bucket(bucket: str) -> S3Store:
    return S3Store(bucket)


def _s3(path: str) -> tuple[S3Store, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{path}: names no bucket; write s3://bucket/key")
    return _s3_bucket(bucket), key


class _S3File(io.RawIOBase):
    """Range requests as a seekable stream; the object must not change while it is read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._store, self._key = _s3(path)
        meta = obstore.head(self._store, self._key)
        self._size, self._etag = meta["size"], meta["e_tag"]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        if stop <= self._position:
            return 0
        options: obstore.GetOptions = {"range": (self._position, stop)}
        if self._etag:
            options["if_match"] = self._etag
        with reading(self._path):
            data = obstore.get(self._store, self._key, options=options).bytes()
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


# Writing: local files


@contextmanager
def staged(path: str) -> Iterator[str]:
    """Give a temporary path beside `path` to write to; on success it becomes `path`, durably.

    On any exception nothing is left. Folders are made. A file already at `path` is replaced at once.

    Raises:
        StorageError: a remote path, or the disk is full, read-only or not permitted.
    """
    folder = _writable_folder(path)
    temporary = os.path.join(folder, TEMPORARY_PREFIX + uuid.uuid4().hex)
    try:
        with _writing(path, temporary, folder):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(folder)
    except BaseException:
        with suppress(OSError):  # on a read-only disk even a missing file gives an error
            os.unlink(temporary)
        raise


def write_atomic(path: str, data: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file that appears whole or not at all; `data` is its bytes or a function that writes them.

    Raises:
        StorageError: as `staged`.
    """
    with staged(path) as temporary:
        _fill(temporary, data)


def put_if_absent(path: str, data: bytes) -> bool:
    """Create a file with `data`; False, and no change, if one is there. Exactly one of many callers wins.

    Raises:
        StorageError: as `staged`, or the disk has no hard links.
    """
    folder = _writable_folder(path)
    temporary = os.path.join(folder, TEMPORARY_PREFIX + uuid.uuid4().hex)
    try:
        with _writing(path, temporary, folder):
            _fill(temporary, data)
            _sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync(folder)
            return True
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def make_folder(path: str) -> None:
    """Make a folder and its parents, durably; one that is there is left alone."""
    require_local(path)
    if os.path.isdir(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    make_folder(parent)
    with _writing(path), suppress(FileExistsError):
        os.mkdir(path)
    if not os.path.isdir(path):
        raise StorageError(f"{path}: is a file, a folder was expected")
    with _writing(path, parent):
        _sync(parent)


def remove(path: str) -> None:
    """Remove a file; one that is not there is no error."""
    require_local(path)
    with _writing(path), suppress(FileNotFoundError):
        os.unlink(path)


def list_files(folder: str, *, temporary: bool = False) -> list[str]:
    """List the files below a local folder, sorted, relative to it.

    Temporary files, which live or killed writers have there, are listed only (and alone) if `temporary`.
    A folder that does not exist has none.
    """
    require_local(folder)
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.startswith(TEMPORARY_PREFIX) == temporary
    )


def modified(path: str) -> float:
    """Return when a local file was last written, in seconds since the epoch; now, if it is gone."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return time.time()


def check_writable(folder: str) -> None:
    """Raise StorageError unless files can be made in a local folder, or in its nearest existing parent."""
    require_local(folder)
    probe = os.path.join(_nearest_existing(folder), TEMPORARY_PREFIX + uuid.uuid4().hex)
    with _writing(folder, probe):
        _fill(probe, b"")
        os.unlink(probe)


def free_bytes(path: str) -> int:
    """Return the bytes free to this user on the disk that holds, or would hold, `path`."""
    require_local(path)
    return shutil.disk_usage(_nearest_existing(path)).free


def _nearest_existing(path: str) -> str:
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


@contextmanager
def _writing(path: str, *also: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # In a `with staged` block other files are in use too; their errors are not ours to explain.
        if error.errno is None or error.filename not in (None, path, *also):
            raise
        remedy = _WRITE_REMEDIES.get(error.errno, "check the disk")
        raise StorageError(f"cannot write {path}: {os.strerror(error.errno)}; {remedy}") from error


def require_local(path: str) -> None:
    if not is_local(path):
        raise StorageError(f"{path}: a lake must be a local folder in this version; use a local path")


def _writable_folder(path: str) -> str:
    require_local(path)
    folder = os.path.dirname(path) or "."
    make_folder(folder)
    return folder


def _fill(path: str, data: bytes | Callable[[BinaryIO], object]) -> None:
    with open(path, "xb") as file:
        if isinstance(data, bytes):
            file.write(data)
        else:
            data(file)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error)


def _one_line(error: Exception, limit: int = 300) -> str:
    # What follows these words in obstore's and blobfile's messages is for their developers.
    text = " ".join(re.split(r"Debug source|, request=<", str(error))[0].split())
    return text if len(text) <= limit else text[:limit] + "..."
