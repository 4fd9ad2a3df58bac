"""A site's HTTP server: it answers GET and HEAD of files, in part where asked, and POST of a text to encode.

What a browser is told keeps pages of other sites, and names that are bound to this address by others, from reading it.
"""

import gzip
import hmac
import ipaddress
import re
import socket
import sys
from collections.abc import Iterator
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Protocol
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from pydantic import ValidationError

from sae.jobs.served import Content, Served
from sae.schemas.errors import SaeError
from sae.schemas.site import Encoded, Typed

ENCODE: Final = "api/encode"
_PIECE: Final = 1 << 20
_MOST_TYPED: Final = 65_536  # bytes of a request's body
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Encoder(Protocol):
    """What answers a typed text; raises a SaeError where it cannot."""

    def encode(self, typed: Typed) -> Encoded:
        """The atoms of each token."""
        ...


class Server(ThreadingHTTPServer):
    """Serves a site on an address; with a token only to those who have it. Raises OSError where it cannot bind."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, address: tuple[str, int], served: Served, token: str | None = None, encoder: Encoder | None = None
    ) -> None:
        self.served, self.token, self.encoder = served, token, encoder
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._host = address[0]
        super().__init__(address, _Handler)

    @property
    def cookie(self) -> str:
        """The name of the one that holds the token: browsers keep those of all of a host's ports together."""
        return f"sae_token_{self.server_port}"

    @property
    def url(self) -> str:
        """What a browser opens."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        query = f"?token={self.token}" if self.token else ""
        return f"http://{host}:{self.server_port}/{query}"

    def knows(self, host: str | None) -> bool:
        """Whether a request's Host is this server: a page whose own name leads here must not read it.

        Where a token is asked for, any address and this machine's names will do.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        names = _LOOPBACK | {self._host}
        if self.token:
            names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        return name in names or (self.token is not None and _is_address(name))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of readers that went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sae", ""
    timeout = 60
    _url: SplitResult

    def parse_request(self) -> bool:
        """Refuses what is no URL, beside what the library refuses."""
        if not super().parse_request():
            return False
        try:
            self._url = urlsplit(self.path)
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return False
        return True

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        # The body of a request that is refused is left unread.
        self.close_connection = True
        if not self._is_allowed():
            return
        length = self.headers.get("Content-Length", "")
        if self._path() != ENCODE:
            self._say(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD", Allow="GET, HEAD")
        elif self.server.encoder is None:
            self._say(HTTPStatus.NOT_FOUND, "no subject is loaded; start the server with --subject")
        elif self.headers.get_content_type() != "application/json":
            self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        elif not length.isdecimal():
            self._say(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        elif len(length) > 9 or int(length) > _MOST_TYPED:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a text and its name take at most {_MOST_TYPED:,} bytes")
        else:
            self._encode(self.server.encoder, self.rfile.read(int(length)))

    def _encode(self, encoder: Encoder, body: bytes) -> None:
        try:
            answer = encoder.encode(Typed.model_validate_json(body))
        except ValidationError as error:
            fault = error.errors()[0]
            self._say(HTTPStatus.BAD_REQUEST, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")
        except SaeError as error:
            self._say(HTTPStatus.BAD_REQUEST, str(error))
        else:
            self._send(HTTPStatus.OK, answer.model_dump_json().encode(), "application/json")

    def _answer(self) -> None:
        if not self._is_allowed():
            return
        if self._path() == ENCODE:
            self._say(HTTPStatus.METHOD_NOT_ALLOWED, "only POST", Allow="POST")
            return
        try:
            content = self.server.served.find(self._path())
        except SaeError as error:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
            return
        if content is None:
            self._say(HTTPStatus.NOT_FOUND, "no such file")
        elif self._has(content):
            self._send(HTTPStatus.NOT_MODIFIED, None, content.type, ETag=f'"{content.tag}"')
        else:
            self._give(content)

    def _has(self, content: Content) -> bool:
        """Whether the reader has kept it."""
        given = [tag.strip().removeprefix("W/") for tag in self.headers.get("If-None-Match", "").split(",")]
        return f'"{content.tag}"' in given or "*" in given

    def _give(self, content: Content) -> None:
        wanted = self._range(content)
        if wanted is None and _is_text(content) and "gzip" in self.headers.get("Accept-Encoding", ""):
            data = gzip.compress(content.read(0, content.size), mtime=0)
            more = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            # Weak: the bytes are others, what they say is not.
            self._send(HTTPStatus.OK, data, content.type, ETag=f'W/"{content.tag}"', **more)
            return
        start, stop = wanted or (0, content.size)
        more = {"ETag": f'"{content.tag}"', "Accept-Ranges": "bytes"}
        if start >= stop and wanted:
            more["Content-Range"] = f"bytes */{content.size}"
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", content.type, **more)
            return
        if wanted:
            more["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
        self._head(HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK, content.type, stop - start, more)
        if self.command != "HEAD":
            for piece in _pieces(content, start, stop):
                self.wfile.write(piece)

    def _range(self, content: Content) -> tuple[int, int] | None:
        """Start and stop of the part that is asked for; empty where there is no such part, None for the whole.

        Several parts in one request are answered with the whole, as any server may.
        """
        found = _RANGE.fullmatch(self.headers.get("Range", "").strip())
        kept = self.headers.get("If-Range", f'"{content.tag}"')
        if self.command == "HEAD" or found is None or found.group() == "bytes=-" or kept != f'"{content.tag}"':
            return None
        first, last = found.groups()
        if not first:
            return max(0, content.size - int(last)), content.size if int(last) else 0
        stop = min(int(last) + 1, content.size) if last else content.size
        if last and int(last) < int(first):
            return None
        return int(first), stop

    def _is_allowed(self) -> bool:
        """Answers those who are not."""
        if not self.server.knows(self.headers.get("Host")):
            self._say(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name; use the address that it printed")
        elif self.command == "POST" and not self._is_of_this_page():
            self._say(HTTPStatus.FORBIDDEN, "only for pages of this server")
        elif self.server.token is not None and not self._has_token(self.server.token):
            given = parse_qs(self._url.query).get("token", [""])[0]
            if not _same(given, self.server.token):
                self._say(HTTPStatus.FORBIDDEN, "a token is needed: open the address that the server printed")
                return False
            cookie = f"{self.server.cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
            # Without the token, so that no link and no history tells it; with one slash, as two lead to another host.
            location = "/" + quote(self._path().lstrip("/"))
            self._send(HTTPStatus.SEE_OTHER, b"", "text/plain", **{"Location": location, "Set-Cookie": cookie})
        else:
            return True
        return False

    def _is_of_this_page(self) -> bool:
        # Where the browser tells it, that holds behind a proxy as well, which has another name in Origin.
        if "Sec-Fetch-Site" in self.headers:
            return bool(self.headers["Sec-Fetch-Site"] == "same-origin")
        from_ = self.headers.get("Origin")
        return from_ is None or urlsplit(from_).netloc == self.headers.get("Host")

    def _has_token(self, token: str) -> bool:
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            return False
        return cookie is not None and _same(cookie.value, token)

    def _path(self) -> str:
        return unquote(self._url.path, errors="replace").removeprefix("/")

    def _say(self, status: HTTPStatus, line: str, **headers: str) -> None:
        self._send(status, f"{line}\n".encode(errors="replace"), "text/plain", **headers)

    def _send(self, status: HTTPStatus, data: bytes | None, kind: str, **headers: str) -> None:
        self._head(status, kind, None if data is None else len(data), headers)
        if data and self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: HTTPStatus, kind: str, size: int | None, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Cache-Control": "no-cache", **headers}.items():
            self.send_header(name, value)
        if size is not None:
            self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library itself refuses."""
        self.close_connection = True
        self.command = getattr(self, "command", None) or "GET"
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        allow = {"Allow": "GET, HEAD"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
        self._say(status, status.phrase, Connection="close", **allow)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the browser tells what fails."""


def _pieces(content: Content, start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, _PIECE):
        yield content.read(at, min(at + _PIECE, stop))


def _is_text(content: Content) -> bool:
    return content.type.startswith("text/") or content.type == "application/json"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
