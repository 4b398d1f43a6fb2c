"""Programs in front of a real nginx, with a redirected guest's eyes (tests/egress/lab.py)."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.egress.conftest import HOST, SECRET
from tests.egress.lab import NGINX, Lab, a_lab, run

pytestmark = pytest.mark.real

CONFIGURATION = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 443 ssl http2; listen 80;
    ssl_certificate {dir}/leaf.pem; ssl_certificate_key {dir}/leaf.pem;
    location /big {{ root {dir}; }}
    location /sink {{
      client_max_body_size 0; proxy_request_buffering off; proxy_http_version 1.1; proxy_pass http://unix:{dir}/sink.sock;
    }}
    location /repo.git {{ root {dir}; if ($http_authorization != "Bearer {secret}") {{ return 401; }} }}
    location / {{ return 200 "auth=$http_authorization proto=$server_protocol host=$host scheme=$scheme\\n"; }}
  }}
}}
"""

BULK = int(os.environ.get("HYPEMAN_BULK_BYTES", 64 << 20))
"""How much is streamed in one request where memory must stay flat. 10 GB were, see ext/egress/README.md."""

proxied = pytest.mark.parametrize("proxied", [False, True], ids=["redirected", "proxied"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    with a_lab(tmp_path_factory.mktemp("redirect")) as made:
        with open(made.dir / "big", "wb") as big:
            big.truncate(BULK)  # sparse
        path = made.dir / "nginx.conf"
        path.write_text(CONFIGURATION.format(dir=made.dir, secret=SECRET))
        made.start(made.world, "nginx", "-p", str(made.dir), "-c", str(path), stderr=subprocess.DEVNULL)
        wait_for_nginx(made)
        yield made


def wait_for_nginx(lab: Lab) -> None:
    run("ip", "netns", "exec", lab.world, "curl", "-sk", "--retry", "40", "--retry-connrefused", "--retry-delay", "1",
        f"https://{NGINX}/")  # fmt: skip


def curl(lab: Lab, *argv: str, proxied: bool = False) -> str:
    return lab.in_guest("curl", "-sS", *argv, proxied=proxied)


@proxied
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(lab: Lab, version: str, proxied: bool) -> None:
    """The second finds the first one's connection in the pool, and must not be led over it: it wants HTTP/2."""
    said = curl(lab, version, f"https://{HOST}/", "-H", "Authorization: Bearer mock-API_KEY", proxied=proxied)
    protocol = "HTTP/2.0" if version == "--http2" else "HTTP/1.1"
    assert said == f"auth=Bearer {SECRET} proto={protocol} host={HOST} scheme=https\n"


def test_plain_http(lab: Lab) -> None:
    assert curl(lab, f"http://{HOST}/") == f"auth= proto=HTTP/1.1 host={HOST} scheme=http\n"


def test_host_without_a_rule(lab: Lab) -> None:
    """Passed through to the real certificate, HTTP/2 included."""
    said = lab.in_guest("curl", "-sS", "--cacert", str(lab.dir / "origin-ca.pem"), "--http2", "https://other.test/")
    assert said == "auth= proto=HTTP/2.0 host=other.test scheme=https\n"


def test_address_without_a_name(lab: Lab) -> None:
    """No server name: the dialled address, unread."""
    said = lab.in_guest("curl", "-sS", "--cacert", str(lab.dir / "origin-ca.pem"), f"https://{NGINX}/")
    assert said == f"auth= proto=HTTP/2.0 host={NGINX} scheme=https\n"


def test_own_address_of_the_host(lab: Lab) -> None:
    """A public address, but the host's: refused without being configured."""
    said = curl(lab, "https://own.test/")
    assert json.loads(said)["code"] == "address_denied"


@proxied
def test_python(lab: Lab, proxied: bool) -> None:
    code = f"import urllib.request as u; print(u.urlopen('https://{HOST}/').read().decode())"
    assert f"auth=Bearer {SECRET}" in lab.in_guest(sys.executable, "-c", code, proxied=proxied)


@proxied
@pytest.mark.parametrize("version", [1, 2])
def test_httpx(lab: Lab, proxied: bool, version: int) -> None:
    code = f"import httpx; print(httpx.Client(http2={version == 2}).get('https://{HOST}/').text)"
    said = lab.in_guest(sys.executable, "-c", code, proxied=proxied)
    assert f"auth=Bearer {SECRET} proto=HTTP/{'2.0' if version == 2 else '1.1'}" in said


@proxied
def test_node(lab: Lab, proxied: bool) -> None:
    """fetch knows nothing of HTTP_PROXY; it works all the same."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    code = f"fetch('https://{HOST}/').then(r => r.text()).then(console.log)"
    assert f"auth=Bearer {SECRET}" in lab.in_guest("node", "-e", code, proxied=proxied)


def test_git(lab: Lab) -> None:
    """A repository behind the credential is cloned by a guest that has none."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    work, bare = lab.dir / "work", lab.dir / "repo.git"
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    run("git", "init", "-q", str(work))
    run("git", "-C", str(work), *identity, "commit", "-q", "--allow-empty", "-m", "first")
    run("git", "clone", "-q", "--bare", str(work), str(bare))
    run("git", "-C", str(bare), "update-server-info")
    for proxied in (False, True):
        clone = f"clone-{proxied}"
        lab.in_guest("git", "clone", "-q", f"https://{HOST}/repo.git", clone, proxied=proxied)
        assert (lab.dir / clone / ".git").is_dir()


class Sink(socketserver.StreamRequestHandler):
    """Behind nginx, which would answer without reading: takes a body and says how long it was."""

    def handle(self) -> None:
        left = 0
        while (line := self.rfile.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                left = int(line.split(b":")[1])
        size, buffer = left, memoryview(bytearray(1 << 18))
        while left and (got := self.rfile.readinto(buffer[:left])):
            left -= got
        said = b"%d" % (size - left)
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """Of the process: resident memory before, and the most while the block ran."""
    seen, over = [resident(pid)] * 2, threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen[1] = max(seen[1], resident(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
def test_any_amount_with_flat_memory(lab: Lab, version: str, up: bool) -> None:
    """One request of BULK bytes, in HTTP/2 on both sides, too: at its end the proxy holds what it held before."""
    small = curl(lab, version, f"https://{HOST}/big", "-r", f"0-{8 << 20}", "-o", "/dev/null", "-w", "%{http_code}")
    assert small == "206"
    argv = [version, f"https://{HOST}/big", "-o", "/dev/null", "-w", "%{size_download}"]
    if up:
        argv = [version, f"https://{HOST}/sink", "-T", str(lab.dir / "big")]
    with socketserver.ThreadingUnixStreamServer(str(lab.dir / "sink.sock"), Sink) as sink, watched(lab.proxy) as seen:
        os.chmod(lab.dir / "sink.sock", 0o666)
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        said = curl(lab, *argv)
        sink.shutdown()
    os.unlink(lab.dir / "sink.sock")
    print(f"{version} {'up' if up else 'down'}: {said} bytes, resident {seen[0] >> 10} KB, at most {seen[1] >> 10} KB")
    assert int(said) == BULK
    assert seen[1] - seen[0] < 12 << 20
