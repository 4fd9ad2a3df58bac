"""Objects in s3://, gs:// and az:// stores, through obstore.

blobfile, which reads text from gs:// and az://, knows no S3, and only on Azure can it put an object where none is and
nowhere else; obstore does that on all three. Credentials and endpoints are those of the environment: AWS_*, GOOGLE_*,
AZURE_*, and as the clouds' own tools have them STORAGE_EMULATOR_HOST, AZURE_STORAGE_KEY and http:// endpoints.
"""

import io
import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar, cast

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

from sae.jobs.storage_errors import is_bucket_missing, reading
from sae.schemas.errors import StorageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore import GetOptions, ObjectMeta

_SHAPES: Final = {"s3": "s3://bucket/key", "gs": "gs://bucket/name", "az": "az://account/container/name"}
_PREFIXES: Final = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_HOST")
_READ_BUFFER: Final = 4 << 20
_PART: Final = 8 << 20
_TRIES: Final = 5
_TIMEOUT: Final = timedelta(seconds=60)
# obstore tries each request again for up to so long: on 5xx answers, and where it only reads on lost ones too.
_RETRY: Final[Any] = {"max_retries": 8, "retry_timeout": timedelta(minutes=2)}

Store = S3Store | GCSStore | AzureStore
Environment = tuple[tuple[str, str], ...]
Result = TypeVar("Result")


def locate(path: str) -> tuple[Store, str]:
    """The store of a path, and the object's key in it.

    Raises:
        StorageError: the path names no bucket.
    """
    scheme, _, rest = path.partition("://")
    *account, rest = rest.split("/", 1) if scheme == "az" else (rest,)
    bucket, _, key = rest.partition("/")
    if not bucket or not all(account) or (scheme == "az" and not account):
        raise StorageError(f"{path}: names no bucket; write {_SHAPES[scheme]}")
    # Part of the cache's key, so that a change of the environment is heeded.
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_PREFIXES)))
    return _opened(scheme, "".join(account), bucket, environment), key


@lru_cache(maxsize=64)
def _opened(scheme: str, account: str, bucket: str, environment: Environment) -> Store:
    given = dict(environment)
    client: dict[str, Any] = {"timeout": _TIMEOUT}
    options: dict[str, Any] = {"retry_config": _RETRY, "client_options": client}
    if scheme == "gs":
        emulator = given.get("STORAGE_EMULATOR_HOST")
        if emulator:
            url = emulator if "://" in emulator else f"http://{emulator}"
            anonymous = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
            options["service_account_key"] = json.dumps({**anonymous, "private_key_id": ""})
            client["allow_http"] = True
        return GCSStore(bucket, **options)
    endpoint = given.get("AWS_ENDPOINT_URL" if scheme == "s3" else "AZURE_STORAGE_ENDPOINT", "")
    if endpoint.startswith("http://"):
        client["allow_http"] = True
    if scheme == "s3":
        return S3Store(bucket, **options)
    if "AZURE_STORAGE_KEY" in given:
        options["account_key"] = given["AZURE_STORAGE_KEY"]
    return AzureStore(bucket, account_name=account, **options)


def _patiently(ask: Callable[[], Result]) -> Result:
    """The answer, asked for again where it was cut off, or lost where obstore would not ask twice."""
    for attempt in range(_TRIES - 1):
        try:
            return ask()
        except GenericError as error:
            if is_bucket_missing(error):
                raise
            time.sleep(0.1 * 2**attempt)
    return ask()


# Reading


def head(path: str) -> "ObjectMeta | None":
    """What the store knows of an object; None where there is none."""
    try:
        return _patiently(lambda: obstore.head(*locate(path)))
    except FileNotFoundError:
        return None


def read(path: str) -> bytes:
    """The whole object; raises FileNotFoundError where there is none."""
    return _patiently(lambda: obstore.get(*locate(path)).bytes().to_bytes())


def read_range(path: str, start: int, stop: int) -> bytes:
    """The object's bytes from `start` to before `stop`, at least one."""
    store, key = locate(path)
    return _patiently(lambda: obstore.get_range(store, key, start=start, end=stop).to_bytes())


def walk(folder: str) -> list["ObjectMeta"]:
    """The objects below a folder of names; their paths are keys of the bucket."""
    store, prefix = _folder(folder)
    return _patiently(lambda: list(itertools.chain.from_iterable(obstore.list(store, prefix))))


def children(folder: str) -> list["ObjectMeta"]:
    """The objects in a folder of names, not below it."""
    store, prefix = _folder(folder)
    return _patiently(lambda: list(obstore.list_with_delimiter(store, prefix)["objects"]))


def is_folder(path: str) -> bool:
    """Whether there is an object whose name goes on below the path."""
    store, prefix = _folder(path)
    return _patiently(lambda: any(obstore.list(store, prefix, chunk_size=1)))


def _folder(path: str) -> tuple[Store, str | None]:
    store, prefix = locate(path)
    return store, prefix.rstrip("/") or None


def open_object(path: str, size: int | None = None) -> BinaryIO:
    """The object as a seekable stream that asks for ranges; a size that is known already saves a request."""
    return cast(BinaryIO, io.BufferedReader(_Ranges(path, size), _READ_BUFFER))


class _Ranges(io.RawIOBase):
    """Range requests as a seekable stream; the object must not change while it is read."""

    def __init__(self, path: str, size: int | None) -> None:
        self._path = path
        self._store, self._key = locate(path)
        self._size = size or 0
        self._options: GetOptions = {}
        if size is None:
            meta = obstore.head(self._store, self._key)
            self._size = meta["size"]
            if meta["e_tag"]:
                self._options["if_match"] = meta["e_tag"]
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
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: bytes(self._next(_PART)), b""))

    def _next(self, n: int) -> memoryview:
        stop = min(self._position + n, self._size)
        if stop <= self._position:
            return memoryview(b"")
        options: GetOptions = {**self._options, "range": (self._position, stop)}
        with reading(self._path):
            data = _patiently(lambda: obstore.get(self._store, self._key, options=options).bytes())
        self._position += len(data)
        return memoryview(data)


# Writing


def upload(path: str, file: BinaryIO) -> None:
    """Stores a file's contents; the object is there when all of it is."""
    store, key = locate(path)

    def whole() -> None:
        file.seek(0)
        obstore.put(store, key, file, chunk_size=_PART, max_concurrency=4)

    _patiently(whole)


def put(path: str, data: bytes) -> None:
    """Stores bytes, in the place of what is there."""
    store, key = locate(path)
    _patiently(lambda: obstore.put(store, key, data, use_multipart=False))


def put_if_absent(path: str, data: bytes) -> bool:
    """Stores bytes unless something is there, which can also be these bytes: their answer may have been lost."""

    def put_or_find() -> bool:
        store, key = locate(path)
        try:
            obstore.put(store, key, data, mode="create", use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    return _patiently(put_or_find)


def remove(path: str) -> None:
    """Deletes an object; one that is not there is no error."""
    with suppress(FileNotFoundError):
        _patiently(lambda: obstore.delete(*locate(path)))
