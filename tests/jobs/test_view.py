"""The server answers like any file host to its own page, and to nobody else."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import aggregate, drop, export
from sae.jobs.served import FolderSite, LiveSite, Served
from sae.jobs.serving import Encoder, Server
from sae.schemas.errors import ConfigError
from sae.schemas.site import Dictionary, Encoded, Site, Typed
from tests.lakes import CORPUS, NAME, Small, encode, small_lake
from tests.tiny_run import sae

TOKEN = "correct-horse-battery"
SEQUENCES = f"/{NAME}/sequences/0.parquet"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Client(NamedTuple):
    server: Server

    def get(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        given_ = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in given_)
        if body is not None:
            given_.setdefault("Content-Length", str(len(body)))
        for name, value in given_.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        found = Answer(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()
        return found


@contextmanager
def serving(served: Served, token: str | None = None, encoder: Encoder | None = None) -> Iterator[Client]:
    with Server(("127.0.0.1", 0), served, token, encoder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_lake(tmp_path_factory.mktemp("view") / "lake")


@pytest.fixture(scope="module")
def site(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "site"
    keys = {"format": "site", "folder": str(folder), "path": "{autoencoder}"}
    export.run(small.config.model_copy(update={"export": small.config.export.model_copy(update=keys)}))
    (folder.parent / "secret.txt").write_text("of somebody else")
    return folder


@pytest.fixture(scope="module", params=["lake", "folder"])
def client(request: pytest.FixtureRequest, small: Small, site: Path) -> Iterator[Client]:
    with serving(LiveSite(small.lake) if request.param == "lake" else FolderSite(str(site))) as found:
        yield found


def test_files_are_those_of_an_export(small: Small, site: Path) -> None:
    with serving(LiveSite(small.lake)) as live:
        for path in site.rglob("*.*"):
            name = str(path.relative_to(site))
            if not name.endswith(".json"):
                assert live.get(f"/{name}").body == path.read_bytes(), name
        assert Site.model_validate_json(live.get("/site.json").body).live
        manifest = Dictionary.model_validate_json(live.get(f"/{NAME}/manifest.json").body)
        assert manifest.autoencoder == NAME
        assert live.get("/").body == (site / "index.html").read_bytes()


def test_an_answer_tells_the_browser_what_is_allowed(client: Client) -> None:
    for path in ("/", "/site.json", SEQUENCES, "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")


@given(st.data())
def test_a_part_is_that_part_of_the_whole(client: Client, data: st.DataObject) -> None:
    whole = client.get(SEQUENCES).body
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first, 2 * len(whole)))
    for asked, expected in (
        (f"bytes={first}-{last}", whole[first : last + 1]),
        (f"bytes={first}-", whole[first:]),
        (f"bytes=-{last + 1}", whole[-last - 1 :]),
    ):
        answer = client.get(SEQUENCES, Range=asked)
        start = len(whole) - len(expected) if asked.startswith("bytes=-") else first
        assert (answer.status, answer.body) == (206, expected)
        assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{len(whole)}"


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=99999999-999999999", "bytes=-0"])
def test_a_part_that_is_not_there_is_416(client: Client, asked: str) -> None:
    answer = client.get(SEQUENCES, Range=asked)
    size = len(client.get(SEQUENCES).body)
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{size}")


@pytest.mark.parametrize("asked", ["bytes=-", "bytes=5-2", "bytes=a-b", "lines=1-2", "bytes=0-1,4-5", "bytes=1-²"])
def test_what_is_no_single_part_gets_the_whole(client: Client, asked: str) -> None:
    answer = client.get(SEQUENCES, Range=asked)
    assert (answer.status, answer.body) == (200, client.get(SEQUENCES).body)


def test_head_tells_the_size(client: Client) -> None:
    answer = client.get(SEQUENCES, "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) == len(client.get(SEQUENCES).body)


def test_what_the_browser_has_is_not_sent_again(client: Client) -> None:
    for path in ("/site.json", SEQUENCES, "/viewer.js"):
        for encoding in ("identity", "gzip"):
            tag = client.get(path, Accept_Encoding=encoding).headers["ETag"]
            answer = client.get(path, If_None_Match=tag, Accept_Encoding=encoding)
            assert (answer.status, answer.body) == (304, b"")
            assert client.get(path, If_None_Match='"other"').status == 200
    tag = client.get(SEQUENCES).headers["ETag"]
    assert client.get(SEQUENCES, Range="bytes=0-3", If_Range=tag).status == 206
    assert client.get(SEQUENCES, Range="bytes=0-3", If_Range='"older"').status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/..%5csecret.txt",
        f"/{NAME}/../../secret.txt",
        "//etc/passwd",
        "/%2fetc/passwd",
        "/.hidden",
        "/linked/secret.txt",
        "/secret-link",
        f"/{NAME}",
        f"/{NAME}/",
        f"/{NAME}/pages",
        f"/{NAME}/pages/1.parquet",
        f"/{NAME}/pages/00.parquet",
        f"/{NAME}/pages/-1.parquet",
        f"/{NAME}/pages/0.parquet/",
        f"/{NAME}/pages/0.parquet%00",
        f"/{NAME}/pages/{'9' * 400}.parquet",
        f"/{NAME}/nothing.json",
        "/unknown/manifest.json",
        "/" + "x" * 5000,
        "/%ff%fe",
    ],
)
def test_nothing_else_is_served(client: Client, site: Path, path: str) -> None:
    for link, target in (("linked", site.parent), ("secret-link", site.parent / "secret.txt")):
        if not (site / link).is_symlink():
            (site / link).symlink_to(target)
    (site / ".hidden").write_text("x")
    answer = client.get(path)
    assert (answer.status, answer.body) == (404, b"no such file\n")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_a_name_that_somebody_else_bound_to_this_address_is_refused(client: Client, host: str) -> None:
    answer = client.get("/site.json", Host=host)
    assert (answer.status, b"autoencoders" in answer.body) == (421, False)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9999", "[::1]:80", "LOCALHOST:1"])
def test_this_machines_own_names_are_known(client: Client, host: str) -> None:
    assert client.get("/site.json", Host=host).status == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "POST", "TRACE", "PROPFIND"])
def test_only_get_and_head(client: Client, method: str) -> None:
    assert client.get("/site.json", method, b"{}").status == 405


def test_a_token_is_given_once_and_then_kept_by_the_browser(small: Small) -> None:
    with serving(LiveSite(small.lake), TOKEN) as client:
        assert client.get("/site.json").status == 403
        assert client.get("/site.json?token=wrong-horse-battery").status == 403
        answer = client.get(f"/site.json?token={TOKEN}")
        assert (answer.status, answer.headers["Location"]) == (303, "/site.json")
        cookie = answer.headers["Set-Cookie"]
        name = cookie.split("=")[0]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert client.get("/site.json", Cookie=cookie.split(";")[0]).status == 200
        assert client.get("/site.json", Cookie=f"{name}=wrong").status == 403
        assert client.get("/site.json", Cookie=f"{name}=é").status == 403
        assert client.get("/site.json", Cookie=cookie.split(";")[0], Host="192.0.2.7:80").status == 200
        assert client.get("/site.json", Cookie=cookie.split(";")[0], Host="evil.example").status == 421


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/%2Fevil.example/", "/evil.example/"),
        ("/%0d%0aX-Evil:%201", "/%0D%0AX-Evil%3A%201"),
        ("/%E6%97%A5", "/%E6%97%A5"),
    ],
)
def test_a_token_leads_only_to_this_server(small: Small, path: str, location: str) -> None:
    with serving(LiveSite(small.lake), TOKEN) as client:
        answer = client.get(f"{path}?token={TOKEN}")
        assert (answer.status, answer.headers["Location"]) == (303, location)
        assert "X-Evil" not in answer.headers


def test_two_servers_of_a_host_have_cookies_of_their_own(small: Small) -> None:
    """A browser keeps one of a name for all ports."""
    with serving(LiveSite(small.lake), TOKEN) as one, serving(LiveSite(small.lake), TOKEN[::-1]) as other:
        cookies = [
            client.get(f"/?token={client.server.token}").headers["Set-Cookie"].split(";")[0] for client in (one, other)
        ]
        assert cookies[0].split("=")[0] != cookies[1].split("=")[0]
        for client in (one, other):
            assert client.get("/site.json", Cookie="; ".join(cookies)).status == 200


def test_what_is_no_url_is_refused_in_one_line(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    answer = client.get("http://[x/", Host="127.0.0.1")
    assert (answer.status, answer.body) == (400, b"Bad Request\n")
    assert capfd.readouterr().err == ""


class Echo:
    """An encoder whose atoms are the lengths of words."""

    def encode(self, typed: Typed) -> Encoded:
        if typed.autoencoder != NAME:
            raise ConfigError(f"autoencoder: no {typed.autoencoder} is loaded")
        words = typed.text.split()
        return Encoded(tokens=words, atoms=[[len(word)] for word in words], acts=[[1.0] for _ in words])


def post(client: Client, body: bytes, **headers: str) -> Answer:
    return client.get("/api/encode", "POST", body, **{"Content_Type": "application/json", **headers})


def test_a_typed_text_is_answered(small: Small) -> None:
    with serving(LiveSite(small.lake, subject=True), encoder=Echo()) as client:
        answer = post(client, json.dumps({"autoencoder": NAME, "text": "<b> ab"}).encode())
        assert answer.status == 200
        assert json.loads(answer.body) == {"tokens": ["<b>", "ab"], "atoms": [[3], [2]], "acts": [[1.0], [1.0]]}
        assert Site.model_validate_json(client.get("/site.json").body).subject


def test_a_text_may_come_through_a_proxy_that_ends_tls(small: Small) -> None:
    """The page is of the proxy, and the browser tells that the request is of that page."""
    body = json.dumps({"autoencoder": NAME, "text": "a"}).encode()
    with serving(LiveSite(small.lake, subject=True), encoder=Echo()) as client:
        assert post(client, body, Origin="https://atoms.example").status == 403
        assert post(client, body, Origin="https://atoms.example", Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "line"),
    [
        (b"{", {}, 400, b"Invalid JSON"),
        (b'{"text": "a"}', {}, 400, b"autoencoder: Field required"),
        (b'{"autoencoder": "small", "text": ""}', {}, 400, b"text: String should have at least 1"),
        (b'{"autoencoder": "small", "text": "\\ud800"}', {}, 400, b"Invalid JSON"),
        (b'{"autoencoder": "none", "text": "a"}', {}, 400, b"no none is loaded"),
        (b"{}", {"Content_Type": "text/plain"}, 415, b"expected application/json"),
        (b"{}", {"Origin": "http://evil.example"}, 403, b"only for pages of this server"),
        (b"{}", {"Content_Length": "99999999"}, 413, b"at most 65,536 bytes"),
        (b"{}", {"Content_Length": "9" * 5000}, 413, b"at most 65,536 bytes"),
        (b"{}", {"Content_Length": "-1"}, 411, b"expected a Content-Length"),
        (b"{}", {"Sec_Fetch_Site": "same-site"}, 403, b"only for pages of this server"),
    ],
)
def test_a_wrong_request_is_told_in_one_line(
    small: Small, body: bytes, headers: dict[str, str], status: int, line: bytes
) -> None:
    with serving(LiveSite(small.lake, subject=True), encoder=Echo()) as client:
        answer = post(client, body, **headers)
        assert (answer.status, answer.body.count(b"\n")) == (status, 1)
        assert line in answer.body


def test_without_a_subject_there_is_nothing_to_type(client: Client) -> None:
    answer = post(client, b"{}")
    assert (answer.status, answer.body) == (404, b"no subject is loaded; start the server with --subject\n")


def test_the_newest_version_is_served(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    with serving(LiveSite(small.lake)) as client:
        before = client.get(SEQUENCES)
        drop.latents(small.lake, CORPUS, [NAME], 2)
        assert json.loads(client.get("/site.json").body)["autoencoders"] == [], "its atoms are of other runs"
        aggregate.run(small.config)
        after = client.get(SEQUENCES, If_None_Match=before.headers["ETag"])
        assert after.status == 200
        assert after.body != before.body
        encode(small, 2)
        aggregate.run(small.config)
        assert client.get(SEQUENCES).body == before.body


def test_a_damaged_file_of_the_lake_is_told_in_one_line(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    with serving(LiveSite(small.lake)) as client:
        for path in (tmp_path / "lake/latents").rglob("*.parquet"):
            path.write_bytes(b"x")
        answer = client.get(SEQUENCES)
        assert (answer.status, answer.body.count(b"\n")) == (500, 1)
        assert b"the log says" in answer.body


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--host", "0.0.0.0"], "error: --host: 0.0.0.0 lets other machines read; give --token with it"),
        (["--host", "0.0.0.0", "--token", "short"], "error: --token: got 5 characters; expected 16 to 128"),
        (["--host", "no.such.host.invalid", "--token"], "error: --port: cannot listen at no.such.host.invalid"),
        (["--port", "99999"], "error: --port: cannot listen at 127.0.0.1, port 99999"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(small: Small, arguments: list[str], line: str) -> None:
    result = sae("view", small.config.lake, *arguments)
    assert (result.code, len(result.lines)) == (1, 1)
    assert result.stderr.startswith(line)


def test_a_taken_port_is_told_in_one_line(small: Small) -> None:
    with serving(LiveSite(small.lake)) as client:
        result = sae("view", small.config.lake, "--port", str(client.server.server_port))
    assert (result.code, len(result.lines)) == (1, 1)
    assert "Address already in use; give another --port, or 0 for any that is free" in result.stderr


def test_a_folder_that_holds_neither_is_told_in_one_line(tmp_path: Path) -> None:
    result = sae("view", tmp_path)
    assert (result.code, len(result.lines)) == (1, 1)
    assert "neither a lake nor an exported site" in result.stderr


def test_a_lake_without_atoms_is_told_in_one_line(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    with small.lake.transaction("drop") as transaction:
        transaction.set(f"aggregate/{NAME}", None)
    result = sae("view", small.config.lake)
    assert (result.code, len(result.lines)) == (1, 1)
    assert "its atoms are not made; run sae aggregate first" in result.stderr


def test_ctrl_c_ends_it(small: Small) -> None:
    command = [sys.executable, "-m", "sae.jobs.cli", "view", small.config.lake, "--port", "0", "--token"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": ""}
    )
    assert process.stdout is not None
    url = process.stdout.readline()
    assert url.startswith("http://127.0.0.1:")
    assert "?token=" in url
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, "view: ended\n")
