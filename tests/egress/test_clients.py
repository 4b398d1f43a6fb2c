"""Clients on real libraries, with a redirected guest's eyes and through HTTP_PROXY: what they do works as without us.

The credential is set on the way, and none of the programs has it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.egress.conftest import SECRET
from tests.egress.lab import GIT_HOST, GO_HOST, GRPC_HOST, ORIGINS, SOCKET_HOST, STREAM_HOST, Lab, a_lab, run
from tests.egress.lab_origins import EVENTS

pytestmark = pytest.mark.real

proxied = pytest.mark.parametrize("proxied", [False, True], ids=["redirected", "proxied"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with a_lab(tmp_path_factory.mktemp("clients")) as made:
        origins = made.start(made.world, sys.executable, "-m", "tests.egress.lab_origins", str(made.dir / "leaf.pem"),
                             str(made.dir))  # fmt: skip
        assert origins.stdout is not None and origins.stdout.readline() == "ready\n"
        yield made


def python(lab: Lab, code: str, proxied: bool, **env: str) -> Any:
    """What the program prints, as JSON."""
    return json.loads(lab.in_guest(sys.executable, "-c", dedent(code), proxied=proxied, **env))


@proxied
def test_grpc(lab: Lab, proxied: bool) -> None:
    """All four kinds of calls, large messages, metadata at both ends, failures: over one connection of HTTP/2."""
    output = python(
        lab,
        f"""
        import grpc, json, os, queue
        roots = open(os.environ["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"], "rb").read()
        channel = grpc.secure_channel("{GRPC_HOST}:443", grpc.ssl_channel_credentials(roots))
        mine = (("authorization", "Bearer mock-API_KEY"),)
        unary = channel.unary_unary("/lab.Echo/Unary")
        big = os.urandom(3 << 20)
        answer, call = unary.with_call(big, metadata=mine, timeout=60)
        trailers = {{name: value for name, value in call.trailing_metadata()}}
        said = {{"echoed": answer == big, "credential": trailers["x-credential"], "bin": list(trailers["x-sum-bin"])}}
        try:
            unary(b"fail", timeout=60)
        except grpc.RpcError as error:
            said["failed"] = [error.code().name, error.details()]
        said["server"] = sum(map(len, channel.unary_stream("/lab.Echo/Server")(b"300", timeout=60)))
        pieces = (bytes(100_000) for _ in range(50))
        said["client"] = channel.stream_unary("/lab.Echo/Client")(pieces, timeout=60).decode()
        asked = queue.SimpleQueue()
        call = channel.stream_stream("/lab.Echo/Both")(iter(asked.get, None), timeout=60)
        said["both"] = []
        for number in range(5):  # the next is said when the one before was answered: nothing is held back
            asked.put(b"%d" % number)
            said["both"].append(next(call).decode())
        asked.put(None)
        said["initial"] = dict(call.initial_metadata())["x-credential"]
        said["end"] = call.code().name
        print(json.dumps(said))
        """,
        proxied,
    )
    assert output == {
        "echoed": True, "credential": "real", "bin": [0, 255], "failed": ["FAILED_PRECONDITION", "näh"],
        "server": sum(len(b"%d " % number) * 1000 for number in range(300)), "client": "5000000",
        "both": ["0", "1", "2", "3", "4"], "initial": "real", "end": "OK",
    }  # fmt: skip


@proxied
def test_websocket(lab: Lab, proxied: bool) -> None:
    """Text, binary in fragments, compressed, pings, and the server's own code at the end."""
    said = python(
        lab,
        f"""
        import json, os
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect
        with connect("wss://{SOCKET_HOST}/", max_size=1 << 24) as socket:
            said = {{"credential": socket.recv(), "deflate": len(socket.protocol.extensions)}}
            socket.send("grüß")
            said["text"] = socket.recv()
            big = os.urandom(2 << 20)
            socket.send(iter([big[:1000], big[1000:]]))
            said["binary"] = socket.recv() == big
            said["pong"] = socket.ping().wait(30)
            socket.send("bye")
            try:
                socket.recv()
            except ConnectionClosed as closed:
                said["closed"] = [closed.rcvd.code, closed.rcvd.reason]
        print(json.dumps(said))
        """,
        proxied,
    )
    assert said == {"credential": "real", "deflate": 1, "text": "grüß", "binary": True, "pong": True,
                    "closed": [4001, "as you wish"]}  # fmt: skip


@proxied
@pytest.mark.parametrize("version", [1, 2])
def test_events(lab: Lab, proxied: bool, version: int) -> None:
    """Every event comes at once: the server waits with the next until this one was acknowledged."""
    said = python(
        lab,
        f"""
        import httpx, httpx_sse, json
        said = []
        with httpx.Client(http2={version == 2}, timeout=60) as client:
            with httpx_sse.connect_sse(client, "GET", "https://{STREAM_HOST}/events") as source:
                for event in source.iter_sse():
                    said.append([event.id, event.event, event.data])
                    assert client.post("https://{STREAM_HOST}/ack").status_code == 200
        print(json.dumps(said))
        """,
        proxied,
    )
    assert said == [[str(number), "tick", "real"] for number in range(EVENTS)]


@proxied
def test_requests(lab: Lab, proxied: bool) -> None:
    """A session, an upload of unknown length, and a redirect to a host without a rule: the credential stays behind."""
    said = python(
        lab,
        f"""
        import json, requests
        with requests.Session() as session:
            said = session.get("https://{STREAM_HOST}/a?b", headers={{"Authorization": "Bearer mine"}}).json()
            said["up"] = session.post("https://{STREAM_HOST}/", data=(bytes([n]) * 50_000 for n in range(40))).json()
            moved = session.get("https://{STREAM_HOST}/elsewhere", allow_redirects=False)
            said["moved"] = [moved.status_code, moved.headers["Location"]]
        print(json.dumps(said))
        """,
        proxied,
    )
    up = b"".join(bytes([n]) * 50_000 for n in range(40))
    assert said == {"credential": "real", "path": "/a?b", "up": {"bytes": len(up), "sha256": sha256(up).hexdigest()},
                    "moved": [302, "https://other.test/"]}  # fmt: skip


@proxied
def test_node(lab: Lab, proxied: bool) -> None:
    """fetch reads a stream of events as it comes, and knows nothing of HTTP_PROXY."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    code = f"""
        (async () => {{
            let said = [], text = "";
            const answer = await fetch("https://{STREAM_HOST}/events");
            for await (const piece of answer.body) {{
                text += Buffer.from(piece).toString();
                while (text.includes("\\n\\n")) {{
                    said.push(text.slice(0, text.indexOf("\\n\\n")).split("data: ")[1]);
                    text = text.slice(text.indexOf("\\n\\n") + 2);
                    await (await fetch("https://{STREAM_HOST}/ack", {{method: "POST", body: "x"}})).text();
                }}
            }}
            console.log(JSON.stringify(said));
        }})()
    """
    assert json.loads(lab.in_guest("node", "-e", code, proxied=proxied)) == ["real"] * EVENTS


@pytest.mark.slow
def test_go(lab: Lab) -> None:
    """A client and a server of net/http, which pick HTTP/2 by themselves and talk in both directions at once."""
    go = shutil.which("go")
    if not go:
        pytest.skip("Go is not installed")
    program, source = str(lab.dir / "go-program"), str(Path(__file__).with_name("lab_program.go"))
    run(go, "build", "-o", program, source, timeout=300)  # the first build of net/http takes its time
    server = lab.start(lab.world, program, "serve", f"{ORIGINS[GO_HOST]}:443", str(lab.dir / "leaf.pem"),
                       f"Bearer {SECRET}")  # fmt: skip
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    for proxied in (False, True):
        assert lab.in_guest(program, GO_HOST, proxied=proxied) == "HTTP/2.0 1 true 0 5\n" * 3


@proxied
def test_git(lab: Lab, proxied: bool) -> None:
    """Clone and push by git's smart protocol, Bearer and Basic; the pack is larger than git sends without chunks."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    bare, clone = f"bare-{proxied}.git", f"work-{proxied}"
    run("git", "init", "-q", "--bare", str(lab.dir / bare))
    run("git", "-C", str(lab.dir / bare), "config", "http.receivepack", "true")
    url = f"https://{GIT_HOST if proxied else STREAM_HOST}/git/{bare}"
    lab.in_guest("git", "clone", "-q", url, clone, proxied=proxied)
    work = lab.dir / clone
    subprocess.run(["dd", "if=/dev/urandom", f"of={work}/file", "bs=1M", "count=3", "status=none"], check=True)
    run("git", "-C", str(work), "add", "file")
    run("git", "-C", str(work), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    lab.in_guest("git", "-C", clone, "push", "-q", "origin", "HEAD:refs/heads/main", proxied=proxied)
    lab.in_guest("git", "clone", "-q", "-b", "main", url, clone + "-again", proxied=proxied)
    assert (lab.dir / f"{clone}-again" / "file").read_bytes() == (work / "file").read_bytes()
