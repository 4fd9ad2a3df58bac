"""The viewer as the package carries it: what a browser loads, built from viewer/."""

import functools
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from sae.schemas.errors import ConfigError

PAGE: Final = "index.html"
_FOLDER: Final = "bundle"


@functools.cache
def files() -> dict[str, bytes]:
    """The content of each file, by its path below the page's folder; index.html is the page."""
    return dict(_below(resources.files("sae.jobs").joinpath(_FOLDER), ""))


def page() -> bytes:
    """The page; raises ConfigError where this installation lacks it."""
    found = files().get(PAGE)
    if found is None:
        raise ConfigError("this installation lacks the viewer's bundle; make viewer builds it, or install the wheel")
    return found


def _below(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.is_dir():
            yield from _below(entry, f"{path}{entry.name}/")
        else:
            yield f"{path}{entry.name}", entry.read_bytes()
