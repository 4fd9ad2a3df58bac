"""A proxy on loopback that passes requests on to an object store's emulator, and misbehaves on demand.

`GcsFront` also speaks the XML API of Google's store, which obstore uses, to an emulator that has only the JSON API.
"""

import http.client
import json
import random
import socket
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from xml.sax.saxutils import escape

Fault = Literal["500", "500 although done", "lost request", "lost answer", "cut", "slow", "403"]
"""What goes wrong: an error instead of the request, or after it was carried out; the connection breaks before or after
that, or half way through the answer; nothing comes for `SLOW_S` seconds; or it is not allowed."""

SLOW_S = 2.5
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def names(self) -> tuple[str, str]:
        """Bucket and key of a path-style request."""
        bucket, _, key = urllib.parse.urlsplit(self.path).path.lstrip("/").partition("/")
        return urllib.parse.unquote(bucket), urllib.parse.unquote(key)

    @property
    def query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query, keep_blank_values=True))


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Proxy:
    """Forwards to `upstream`, http://host:port; `inject` makes some of the next requests go wrong, `misbehave` any."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._faults: list[tuple[Fault, Callable[[Request], bool]]] = []
        self._at_random: Callable[[], Fault | None] = lambda: None
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self.delay_s = 0.0  # before each request goes on, as a distant store's
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def inject(self, fault: Fault, times: int = 1, when: Callable[[Request], bool] = lambda _: True) -> None:
        self._faults.extend([(fault, when)] * times)

    def misbehave(self, rate: float, faults: Sequence[Fault], seed: int) -> Counter[Fault]:
        """Makes requests go wrong at random from now on, a share `rate` of them; counts what happened to them."""
        draw, happened = random.Random(seed), Counter[Fault]()

        def at_random() -> Fault | None:
            if draw.random() >= rate:
                return None
            fault = draw.choice(faults)
            happened[fault] += 1
            return fault

        self._at_random = at_random
        return happened

    def forget_faults(self) -> None:
        self._faults.clear()

    @property
    def all_happened(self) -> bool:
        return not self._faults

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forward(self, request: Request) -> Answer:
        # moto looks whether there is an object and stores another in two steps: real stores do it in one.
        with self._lock:
            return self.ask(request.method, request.path, request.headers, request.body)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Answer:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            kept = {key: value for key, value in response.getheaders() if key.lower() not in _HOP}
            data = response.read()
            length = response.getheader("Content-Length")
            if method == "HEAD" and length is not None:
                kept["Content-Length"] = length
            return Answer(response.status, kept, data)
        finally:
            connection.close()

    def _fault(self, request: Request) -> Fault | None:
        for number, (fault, when) in enumerate(self._faults):
            if when(request):
                del self._faults[number]
                return fault
        return self._at_random()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
                request = Request(self.command, self.path, headers, _body(self))
                with proxy._lock:
                    proxy.requests.append(request)
                    fault = proxy._fault(request)
                time.sleep(proxy.delay_s)
                if fault == "403":
                    answer = Answer(403, body=b"<Error><Code>AccessDenied</Code></Error>")
                elif fault in ("500", "lost request"):
                    answer = Answer(500, body=b"<Error><Code>InternalError</Code></Error>")
                else:
                    answer = proxy.forward(request)
                if fault == "500 although done":
                    answer = Answer(500, body=b"<Error><Code>InternalError</Code></Error>")
                if fault == "slow":
                    time.sleep(SLOW_S)
                if fault in ("lost request", "lost answer"):
                    self._hang_up()
                else:
                    self._send(answer, cut=fault == "cut")

            def _send(self, answer: Answer, cut: bool) -> None:
                try:
                    self.send_response(answer.status)
                    for key, value in answer.headers.items():
                        self.send_header(key, value)
                    if "Content-Length" not in answer.headers:
                        self.send_header("Content-Length", str(len(answer.body)))
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
                    self.wfile.flush()
                except ConnectionError:  # a client that waits no longer
                    self.close_connection = True
                if cut:
                    self._hang_up()

            def _hang_up(self) -> None:
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        return Handler


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))


class GcsFront(Proxy):
    """Answers the XML API from an emulator's JSON API; whether an object is there already is the emulator's to say."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self._uploads: dict[str, dict[int, bytes]] = {}

    def forward(self, request: Request) -> Answer:
        bucket, key = request.names
        query = request.query
        if not key:
            return self._list(bucket, query)
        if "uploads" in query:
            self._uploads[upload := f"u{len(self._uploads)}"] = {}
            return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        if "uploadId" in query and request.method == "PUT":
            self._uploads[query["uploadId"]][int(query["partNumber"])] = request.body
            return Answer(200, {"ETag": f'"{query["partNumber"]}"'})
        if "uploadId" in query and request.method == "POST":
            parts = self._uploads.pop(query["uploadId"])
            stored = self._store(bucket, key, b"".join(parts[number] for number in sorted(parts)), {})
            return _xml("CompleteMultipartUploadResult", f"<ETag>{stored.headers.get('ETag')}</ETag>", stored.status)
        if request.method == "PUT":
            return self._store(bucket, key, request.body, request.headers)
        if request.method == "DELETE":
            return self._answered(bucket, 204, self.ask("DELETE", _object(bucket, key), {}))
        return self._read(request, bucket, key)

    def _store(self, bucket: str, key: str, data: bytes, headers: dict[str, str]) -> Answer:
        query = {"uploadType": "multipart"}  # of the kinds of upload, the one whose condition the emulator heeds
        if "x-goog-if-generation-match" in headers:
            query["ifGenerationMatch"] = headers["x-goog-if-generation-match"]
        boundary = uuid.uuid4().hex
        meta = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': key})}\r\n"
        media = f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        body = meta.encode() + media.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        path = f"/upload/storage/v1/b/{bucket}/o?{urllib.parse.urlencode(query)}"
        found = self.ask("POST", path, {"Content-Type": f"multipart/related; boundary={boundary}"}, body)
        if found.status != 200:
            return self._answered(bucket, found.status, found)
        known = json.loads(found.body)
        return Answer(200, {"ETag": f'"{known["etag"]}"', "x-goog-generation": str(known["generation"])})

    def _read(self, request: Request, bucket: str, key: str) -> Answer:
        found = self.ask("GET", _object(bucket, key), {})
        if found.status != 200:
            return self._answered(bucket, found.status, found)
        meta = json.loads(found.body)
        headers = {
            "ETag": f'"{meta["etag"]}"',
            "Last-Modified": format_datetime(datetime.fromisoformat(meta["updated"]), usegmt=True),
            "x-goog-generation": str(meta["generation"]),
        }
        asked = {key.lower(): value for key, value in request.headers.items()}
        if asked.get("if-match", headers["ETag"]) != headers["ETag"]:
            return Answer(412)
        if request.method == "HEAD":
            return Answer(200, {**headers, "Content-Length": meta["size"]})
        ranged = {"Range": asked["range"]} if "range" in asked else {}
        media = self.ask("GET", f"{_object(bucket, key)}?alt=media", ranged)
        kept = {key: value for key, value in media.headers.items() if key.lower() == "content-range"}
        return Answer(media.status, {**headers, **kept}, media.body)

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        names = {"prefix": "prefix", "delimiter": "delimiter", "start-after": "startOffset", "max-keys": "maxResults"}
        asked = {names[key]: value for key, value in query.items() if key in names}
        if "continuation-token" in query:
            asked["pageToken"] = query["continuation-token"]
        found = self.ask("GET", f"/storage/v1/b/{bucket}/o?{urllib.parse.urlencode(asked)}", {})
        if found.status != 200:
            return self._answered(bucket, found.status, found)
        page = json.loads(found.body)
        parts = [
            f"<Contents><Key>{escape(item['name'])}</Key><Size>{item['size']}</Size>"
            f"<LastModified>{item['updated']}</LastModified><ETag>{item['etag']}</ETag></Contents>"
            for item in page.get("items", [])
        ]
        parts += [
            f"<CommonPrefixes><Prefix>{escape(prefix)}</Prefix></CommonPrefixes>" for prefix in page.get("prefixes", [])
        ]
        if page.get("nextPageToken"):
            parts.append(f"<NextContinuationToken>{page['nextPageToken']}</NextContinuationToken>")
        return _xml("ListBucketResult", "".join(parts))

    def _answered(self, bucket: str, status: int, found: Answer) -> Answer:
        if found.status != 404:
            return Answer(status if found.status < 300 else found.status)
        bucket_is_there = self.ask("GET", f"/storage/v1/b/{bucket}", {}).status == 200
        return _xml("Error", f"<Code>{'NoSuchKey' if bucket_is_there else 'NoSuchBucket'}</Code>", 404)


def _object(bucket: str, key: str) -> str:
    return f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}"


def _xml(tag: str, inner: str, status: int = 200) -> Answer:
    text = f'<?xml version="1.0" encoding="UTF-8"?><{tag}>{inner}</{tag}>'
    return Answer(status, {"Content-Type": "application/xml"}, text.encode())
