"""A push of 300 MB to the registry, against Debian's docker-registry: wall time, CPU of the server, and its memory
while ten clients push 90 MB each at once.

Both get the same requests from the same client, which sends files without reading them: ten blobs, each begun with
POST, sent with PATCH and completed with PUT, as docker, skopeo and podman do, then an artifact's manifest. Both flush
each blob to the disk. Memory is the most that a server had in RAM, without what it had before.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from hypeman.tokens import mint
from tests.bench.harness import Result, compare, forget_peak, peak_memory, process_cpu_time
from tests.images.conftest import free_port, need

_ROOT = Path(__file__).parents[2]
_ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
_BLOBS, _SIZE = 10, 30 << 20
_SECRET = "a secret that is long enough for HS256"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Peer(NamedTuple):
    pid: int
    port: int
    token: str = ""


def run() -> list[Result]:
    if shutil.which("docker-registry") is None:
        return []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_ROOT / "build")))
        blobs = _blobs(directory)
        ours = stack.enter_context(_ours(directory / "ours"))
        theirs = stack.enter_context(_theirs(directory / "theirs"))
        results = [
            compare("registry: push of 300 MB", "s", _pushing(ours, blobs, _wall), "docker-registry",
                    _pushing(theirs, blobs, _wall), _ROUNDS),
            compare("registry: push of 300 MB, server", "s CPU", _pushing(ours, blobs, _cpu), "docker-registry",
                    _pushing(theirs, blobs, _cpu), _ROUNDS),
        ]  # fmt: skip
        before, after = (_grown(peer, blobs) / 1e6 for peer in (theirs, ours))
        results.append(Result("registry: memory, ten pushes at once", after, "MB more", "docker-registry", before))
    return results


def _blobs(directory: Path) -> dict[str, Path]:
    found = {}
    for number in range(_BLOBS):
        path = directory / f"blob{number}"
        path.write_bytes(os.urandom(_SIZE))
        found[f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"] = path
    (directory / "empty").write_bytes(b"{}")
    return found


@contextmanager
def _ours(directory: Path) -> Iterator[Peer]:
    argv = [sys.executable, "-m", "tests.bench.registry_child", str(directory), _SECRET]
    with (directory.parent / "ours.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, cwd=_ROOT)
    try:
        assert process.stdout is not None
        yield Peer(process.pid, int(process.stdout.readline()), mint(_SECRET, subject="bench"))
    finally:
        process.kill()
        process.wait()


@contextmanager
def _theirs(directory: Path) -> Iterator[Peer]:
    need("docker-registry")
    directory.mkdir()
    port = free_port()
    config = directory / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "docker-registry did not start"
            time.sleep(0.02)
        yield Peer(process.pid, port)
    finally:
        process.kill()
        process.wait()


def _pushing(
    peer: Peer, blobs: dict[str, Path], cost: Callable[[Peer, Callable[[], None]], float]
) -> Callable[[], float]:
    numbers = iter(range(1000))
    return lambda: cost(peer, lambda: _push(peer, blobs, f"bench/{cost.__name__.strip('_')}{next(numbers)}"))


def _wall(peer: Peer, work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _cpu(peer: Peer, work: Callable[[], None]) -> float:
    begin = process_cpu_time(peer.pid)
    work()
    return process_cpu_time(peer.pid) - begin


def _grown(peer: Peer, blobs: dict[str, Path]) -> int:
    """Bytes that the server had more at most, while ten clients pushed."""
    some = dict(list(blobs.items())[:3])
    before = forget_peak(peer.pid)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda number: _push(peer, some, f"bench/at-once{number}"), range(10)))
    return peak_memory(peer.pid) - before


def _push(peer: Peer, blobs: dict[str, Path], repository: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=600)
    config = f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    for digest, path in blobs.items():
        _upload(connection, peer, repository, digest, path)
    _upload(connection, peer, repository, config, next(iter(blobs.values())).with_name("empty"))
    layers = [{"mediaType": "application/octet-stream", "digest": digest, "size": _SIZE} for digest in blobs]
    manifest = {
        "schemaVersion": 2, "mediaType": _MANIFEST, "artifactType": "application/x.bench",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": 2}, "layers": layers,
    }  # fmt: skip
    _ask(connection, peer, "PUT", f"/v2/{repository}/manifests/v1", 201, body=json.dumps(manifest).encode(),
         **{"Content-Type": _MANIFEST})  # fmt: skip
    connection.close()


def _upload(connection: http.client.HTTPConnection, peer: Peer, repository: str, digest: str, path: Path) -> None:
    at = _ask(connection, peer, "POST", f"/v2/{repository}/blobs/uploads/", 202)
    connection.putrequest("PATCH", at)
    connection.putheader("Content-Length", str(path.stat().st_size))
    connection.putheader("Content-Type", "application/octet-stream")
    if peer.token:
        connection.putheader("Authorization", f"Bearer {peer.token}")
    connection.endheaders()
    with path.open("rb") as file:
        connection.sock.sendfile(file)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 202, answer.status
    at = _path(answer.headers["Location"])
    _ask(connection, peer, "PUT", f"{at}{'&' if '?' in at else '?'}digest={digest}", 201)


def _ask(
    connection: http.client.HTTPConnection,
    peer: Peer,
    method: str,
    path: str,
    status: int,
    body: bytes = b"",
    **headers: str,
) -> str:
    """Path of the Location that is answered."""
    if peer.token:
        headers["Authorization"] = f"Bearer {peer.token}"
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status == status, (answer.status, data)
    return _path(answer.headers["Location"])


def _path(location: str) -> str:
    found = urlsplit(location)
    return f"{found.path}?{found.query}" if found.query else found.path
