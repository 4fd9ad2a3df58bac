"""What goes wrong with files and objects, in one line that names the path and says how to mend it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import blobfile
from obstore.exceptions import BaseError as ObstoreError
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from sae.schemas.errors import StorageError

NO_FILE: Final = "{}: no such file, folder or bucket; check the path"
_STORES: Final = ("s3", "gs", "az")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Of a missing bucket, as each store calls it; in answers without a body there is no telling.
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_CREDENTIALS: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
    "": "grant this user access to it",
}


def scheme(path: str) -> str:
    """Return "s3", "gs", "az", or "" for a local path.

    Raises:
        StorageError: another scheme.
    """
    match = _SCHEME.match(path)
    if match and match[1] not in _STORES:
        raise StorageError(f"{path}: unknown scheme {match[1]}://; use a local path, s3://, gs:// or az://")
    return match[1] if match else ""


def is_missing(error: Exception) -> bool:
    """Whether an error says that an object or its bucket is not there."""
    return isinstance(error, FileNotFoundError) or is_bucket_missing(error)


def is_bucket_missing(error: Exception) -> bool:
    """Whether an error says that the bucket itself is not there."""
    return any(words in str(error) for words in _NO_BUCKET)


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
        if is_missing(error):
            raise StorageError(NO_FILE.format(path)) from error
        _check_credentials(path, error)
        hint = f"check the path, the network and the credentials: {_CREDENTIALS[scheme(path)]}"
        raise StorageError(f"cannot read {path}: {_one_line(error)}; {hint}") from error
    except OSError as error:
        if error.errno is None:  # a decoder's complaint about the contents, not the system's
            raise
        raise StorageError(f"cannot read {path}: {os.strerror(error.errno)}") from error


@contextmanager
def storing(path: str) -> Iterator[None]:
    """Turn what a store raises while `path` is written into a StorageError that names it."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        remedy = f"use a bucket that you may write to, or {_CREDENTIALS[scheme(path)]}"
        raise StorageError(f"cannot write {path}: permission denied; {remedy}") from error
    except (FileNotFoundError, ObstoreError) as error:
        if is_missing(error):
            raise StorageError(f"cannot write {path}: no such bucket; create it or check the path") from error
        _check_credentials(path, error)
        hint = f"check the network and the credentials: {_CREDENTIALS[scheme(path)]}"
        raise StorageError(f"cannot write {path}: {_one_line(error)}; {hint}") from error


def _check_credentials(path: str, error: Exception) -> None:
    # Where none are given they are asked of the cloud's machine that this would be.
    if any(host in str(error) for host in ("169.254.169.254", "metadata.google.internal")):
        raise StorageError(f"{path}: no credentials found; {_CREDENTIALS[scheme(path)]}") from error


def _one_line(error: Exception, limit: int = 300) -> str:
    # What follows these words in obstore's and blobfile's messages is for their developers.
    text = " ".join(re.split(r"Debug source|, request=<", str(error))[0].split())
    return text if len(text) <= limit else text[:limit] + "..."
