"""Files, local or in an object store: the one module that opens paths.

A path is a string: a local path, `s3://bucket/key`, `gs://bucket/name` or `az://account/container/name`.
blobfile streams local files, gs:// and az://; what it cannot do is done by obstore, in stores.py. A file is complete
from the moment that its name is visible, wherever it is.
"""

import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import blobfile
from obstore.exceptions import BaseError as ObstoreError

from sae.jobs import stores
from sae.jobs.storage_errors import NO_FILE, is_bucket_missing, is_missing, scheme, storing
from sae.jobs.storage_errors import reading as reading
from sae.schemas.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
_SCRATCH_PREFIX = ".sae-"
_SCRATCH_AGE_S = 86_400.0  # longer than anybody writes or copies a file
_WILDCARD = re.compile(r"[*?]")
_COPY_BYTES = 16 << 20
_REQUESTS = 8  # to a store at once

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


def is_local(path: str) -> bool:
    """Tell whether `path` is in the local file system."""
    return scheme(path) == ""


def join(base: str, *parts: str) -> str:
    """Join `parts` to `base` with single slashes; a part never replaces the base."""
    for part in parts:
        base = f"{base.rstrip('/')}/{part.lstrip('/')}" if base else part
    return base


def duckdb_url(path: str) -> str:
    """Return the path as DuckDB's own extensions for object stores take it."""
    account, _, rest = path.removeprefix("az://").partition("/")
    return f"az://{account}.blob.core.windows.net/{rest}" if scheme(path) == "az" else path


# Reading


def open_read(path: str) -> BinaryIO:
    """Open a file for reading in a stream; seekable, never downloaded whole.

    Errors later in the stream are the store's own: read inside `reading(path)`.

    Raises:
        StorageError: the file cannot be opened.
    """
    with reading(path):
        if scheme(path) == "s3":
            return stores.open_object(path)
        return _blobs.BlobFile(path, "rb", streaming=True)


def open_object(path: str, size: int | None = None) -> BinaryIO:
    """Open an object of a store for reads here and there; its size, where it is known, saves a request.

    Raises:
        StorageError: it cannot be opened. Later errors are the store's own, as with `open_read`.
    """
    with reading(path):
        return stores.open_object(path, size)


def read_range(path: str, start: int, stop: int) -> bytes:
    """Read a part of a file, at least a byte; `stop` is behind its end."""
    with reading(path):
        if is_local(path):
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        return stores.read_range(path, start, stop)


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Give a local path with the file's contents: its own, or that of a copy that is deleted afterwards.

    A memory map of the copy outlives it.
    """
    if is_local(path):
        yield path
        return
    with _scratch() as temporary:
        with _writing(temporary), open(temporary, "wb") as copy, open_object(path) as file, reading(path):
            shutil.copyfileobj(file, copy, _COPY_BYTES)
        yield temporary


def read_bytes(path: str) -> bytes:
    """Read a whole file."""
    found = read_if_there(path)
    if found is None:
        raise StorageError(NO_FILE.format(path))
    return found


def read_if_there(path: str) -> bytes | None:
    """Read a whole file; None where there is none, but an error where there is not even its bucket."""
    with reading(path):
        try:
            if not is_local(path):
                return stores.read(path)
            with open(path, "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            if is_bucket_missing(error):
                raise
            return None


def sha256(path: str) -> str:
    """Hash a file, streaming; hexadecimal."""
    with open_read(path) if is_local(path) else open_object(path) as file, reading(path):
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def exists(path: str) -> bool:
    """Tell whether there is a file or a folder at `path`."""
    with reading(path):
        if is_local(path):
            return os.path.exists(path)
        try:
            return stores.head(path) is not None or stores.is_folder(path)
        except (FileNotFoundError, ObstoreError) as error:
            if not is_missing(error):
                raise
            return False


def size(path: str) -> int:
    """Return the size of a file in bytes."""
    found = size_if_there(path)
    if found is None:
        raise StorageError(NO_FILE.format(path))
    return found


def size_if_there(path: str) -> int | None:
    """Return the size of a file in bytes; None where there is none."""
    with reading(path):
        return _file_size(path)


@dataclass(frozen=True, slots=True)
class Stated:
    """What a store says of an object: its size in bytes, what tells its versions apart, and its MD5 where known."""

    size: int
    version: str | None
    md5: str | None


def state(path: str) -> Stated:
    """Ask a store about an object.

    Raises:
        StorageError: there is none, or it cannot be asked.
    """
    with reading(path):
        if scheme(path) in ("az", "gs"):
            found = _blobs.stat(path)
            return Stated(found.size, found.version, found.md5)
        meta = stores.head(path)
        if meta is None:
            raise StorageError(NO_FILE.format(path))
        return Stated(meta["size"], meta["e_tag"], None)


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
        if not is_local(path):
            meta = stores.head(path)
            return None if meta is None else meta["size"]
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
    folder = prefix[: prefix.rindex("/")] if prefix.count("/") > 2 else prefix
    for meta in stores.children(folder) if depth == 1 else stores.walk(folder):
        yield FileInfo(f"s3://{bucket}/{meta['path']}", meta["size"])


_LISTINGS = {"": _list_local, "gs": _list_blobs, "az": _list_blobs, "s3": _list_s3}


# Writing


@contextmanager
def staged(path: str) -> Iterator[str]:
    """Give a temporary local path to write to; on success its contents are at `path`, durably.

    On any exception nothing is left. Folders are made. A file already at `path` is replaced at once.

    Raises:
        StorageError: the disk is full, read-only or not permitted; the store cannot be written to.
    """
    if not is_local(path):
        with _scratch() as temporary:
            with _writing(temporary):
                yield temporary
            with open(temporary, "rb") as file, storing(path):
                stores.upload(path, file)
        return
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


def write_together(folder: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files by their names in a folder, each of which appears whole or not at all, all of them durably.

    A disk takes many at once in far less time than one after the other with `write_atomic`.

    Raises:
        StorageError: as `staged`.
    """
    if not is_local(folder):
        with ThreadPoolExecutor(_REQUESTS) as pool:
            for _ in pool.map(lambda file: write_atomic(join(folder, file[0]), file[1]), files):
                pass
        return
    make_folder(folder)
    written: list[tuple[str, str]] = []
    try:
        with _writing(folder):
            for name, data in files:
                written.append((os.path.join(folder, TEMPORARY_PREFIX + uuid.uuid4().hex), name))
                with _writing(os.path.join(folder, name), written[-1][0]):
                    _fill(written[-1][0], data)
            for temporary, _ in written:
                _sync(temporary)
            for temporary, name in written:
                os.replace(temporary, os.path.join(folder, name))
            _sync(folder)
    except BaseException:
        for temporary, _ in written:
            with suppress(OSError):
                os.unlink(temporary)
        raise


@contextmanager
def _scratch() -> Iterator[str]:
    """Give the path of a file that does not exist yet, in the folder that TMPDIR names; it is deleted afterwards."""
    _remove_old_scratch(tempfile.gettempdir())
    temporary = os.path.join(tempfile.gettempdir(), _SCRATCH_PREFIX + uuid.uuid4().hex)
    try:
        yield temporary
    finally:
        with suppress(OSError):
            os.unlink(temporary)


@functools.cache
def _remove_old_scratch(folder: str) -> None:
    """Delete, once in a process, what processes that were killed left in the folder."""
    oldest = time.time() - _SCRATCH_AGE_S
    for entry in os.scandir(folder):
        if re.fullmatch(re.escape(_SCRATCH_PREFIX) + "[0-9a-f]{32}", entry.name):
            with suppress(OSError):  # another user's, or gone already
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)


def put_if_absent(path: str, data: bytes) -> bool:
    """Create a file with `data`; False, and no change, if one is there. Exactly one of many callers wins.

    In an object store the answer can be lost on its way. Then it may be False although the file is the caller's, who
    has to look; and where an error is raised, the file may still appear later.

    Raises:
        StorageError: as `staged`, or the disk has no hard links.
    """
    if not is_local(path):
        with storing(path):
            return stores.put_if_absent(path, data)
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
    if not is_local(path):
        with storing(path):
            stores.remove(path)
        return
    with _writing(path), suppress(FileNotFoundError):
        os.unlink(path)


def remove_older(paths: Iterable[str], than_s: float) -> set[str]:
    """Remove those of the files that were last written before a time in seconds since the epoch; returns them."""

    def remove_if_older(path: str) -> str | None:
        if modified(path) >= than_s:
            return None
        remove(path)
        return path

    with ThreadPoolExecutor(_REQUESTS) as pool:
        return {path for path in pool.map(remove_if_older, paths) if path is not None}


def list_files(folder: str, *, temporary: bool = False) -> list[str]:
    """List the files below a folder, sorted, relative to it.

    Temporary files, which live or killed writers have there, are listed only (and alone) if `temporary`.
    A folder that does not exist has none.
    """
    if not is_local(folder):
        return [] if temporary else sorted(sizes_below(folder))
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.startswith(TEMPORARY_PREFIX) == temporary
    )


def sizes_below(folder: str) -> dict[str, int]:
    """The sizes in bytes of all objects below a folder of a store, by name relative to it."""
    with reading(folder):
        start = len(stores.locate(folder)[1].rstrip("/")) + 1
        return {meta["path"][start:]: meta["size"] for meta in stores.walk(folder)}


def modified(path: str) -> float:
    """Return when a file was last written, in seconds since the epoch; now, if it is gone."""
    if not is_local(path):
        with reading(path):
            meta = stores.head(path)
        return time.time() if meta is None else meta["last_modified"].timestamp()
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
        raise StorageError(f"{path}: is in an object store; give a local folder")


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
