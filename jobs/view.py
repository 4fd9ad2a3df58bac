"""Command view: serves a lake, or a site that was exported from one, to a browser."""

import ipaddress
import re
import secrets
from argparse import Namespace
from typing import Final

from sae.jobs import bundled
from sae.jobs.lake import Lake
from sae.jobs.progress import say
from sae.jobs.served import FolderSite, LiveSite, Served
from sae.jobs.serving import Encoder, Server
from sae.schemas.errors import ConfigError, LakeError

RANDOM: Final = "random"
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")


def view(given: Namespace) -> None:
    """Serves until it is interrupted."""
    token = _token(given.host, given.token)
    served, encoder = _served(given.lake, given.subject)
    with _bound(given.host, given.port, served, token, encoder) as server:
        try:
            print(server.url, flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            say("view: ended")


def _served(path: str, subject: bool) -> tuple[Served, Encoder | None]:
    try:
        lake = Lake(path)
    except LakeError:
        if subject:
            raise
        return FolderSite(path), None
    bundled.page()
    live = LiveSite(lake, subject=subject)
    if not subject:
        return live, None
    from sae.jobs.typed import SentenceEncoder  # torch takes seconds

    say("view: loading the subject")
    return live, SentenceEncoder(lake)


def _token(host: str, given: str | None) -> str | None:
    """What a reader has to know; raises ConfigError where others than this machine's users could read without."""
    if given is None and not _is_loopback(host):
        raise ConfigError(
            f"--host: {host} lets other machines read; give --token with it (alone for a random one, or of 16 to 128 "
            "letters, digits, - and _)"
        )
    if given == RANDOM:
        return secrets.token_urlsafe(24)
    if given is not None and not _TOKEN.fullmatch(given):
        raise ConfigError(f"--token: got {len(given)} characters; expected 16 to 128 letters, digits, - and _")
    return given


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int, served: Served, token: str | None, encoder: Encoder | None) -> Server:
    try:
        return Server((host, port), served, token, encoder)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--port: cannot listen at {host}, port {port}: {reason}; give another --port, or 0 for any that is free"
        ) from None
