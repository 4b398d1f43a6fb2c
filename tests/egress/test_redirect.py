"""Real programs in a guest's place: a network namespace whose TCP to ports 80 and 443 is redirected, as a TAP's is.

    guest 10.77.0.2 ── host 10.77.0.1 (nft dnat to the proxy) ── world 93.184.216.34 (nginx)

The programs know nothing of a proxy. The address that they dial is a wrong one on purpose: the name decides.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trustme

from tests.egress.conftest import HOST, SECRET

pytestmark = pytest.mark.real

ORIGIN = "93.184.216.34"
OWN = "93.184.216.1"
ELSEWHERE = "93.184.216.99"
PORT = 18080

NGINX = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 443 ssl http2; listen 80;
    ssl_certificate {dir}/leaf.pem; ssl_certificate_key {dir}/leaf.pem;
    location /repo.git {{ root {dir}; if ($http_authorization != "Bearer {secret}") {{ return 401; }} }}
    location / {{ return 200 "auth=$http_authorization proto=$server_protocol host=$host scheme=$scheme\\n"; }}
  }}
}}
"""

NFT = f"""
table ip t {{
  chain pre {{ type nat hook prerouting priority -100;
    iifname "hg0" tcp dport {{ 80, 443 }} dnat to 10.77.0.1:{PORT}
  }}
}}
"""


def run(*argv: str, timeout: float = 60, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=timeout, **kwargs)  # type: ignore[call-overload,no-any-return]


class Lab:
    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.tag = f"eg{os.getpid()}"
        self.guest, self.host, self.world = (f"{self.tag}{each}" for each in "ghw")
        self.etc = Path("/etc/netns") / self.guest

    def in_guest(self, *argv: str, **env: str) -> str:
        merged = {"PATH": os.environ["PATH"], "HOME": str(self.dir), **env}
        done = subprocess.run(["ip", "netns", "exec", self.guest, *argv], env=merged, cwd=self.dir,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    for tool in ("ip", "nft", "nginx"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Lab(tmp_path_factory.mktemp("redirect"))
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(made.dir / "origin-ca.pem"))
    leaf = ca.issue_cert(HOST, "other.test", ORIGIN)
    leaf.private_key_and_cert_chain_pem.write_to_path(str(made.dir / "leaf.pem"))
    (made.dir / "nginx.conf").write_text(NGINX.format(dir=made.dir, secret=SECRET))
    started: list[subprocess.Popen[str]] = []
    try:
        for name in (made.guest, made.host, made.world):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for one, of_one, other, of_other, a, b in (
            ("hg0", made.host, "eth0", made.guest, "10.77.0.1/24", "10.77.0.2/24"),
            ("hw0", made.host, "eth0", made.world, f"{OWN}/24", f"{ORIGIN}/24"),
        ):
            run("ip", "link", "add", one, "netns", of_one, "type", "veth", "peer", "name", other, "netns", of_other)
            for name, link, address in ((of_one, one, a), (of_other, other, b)):
                run("ip", "-n", name, "addr", "add", address, "dev", link)
                run("ip", "-n", name, "link", "set", link, "up")
        run("ip", "-n", made.guest, "route", "add", "default", "via", "10.77.0.1")
        run("ip", "netns", "exec", made.host, "nft", "-f", "-", input=NFT)
        made.etc.mkdir(parents=True)
        (made.etc / "hosts").write_text(f"127.0.0.1 localhost\n{ELSEWHERE} {HOST} other.test own.test\n")
        nginx = ["ip", "netns", "exec", made.world, "nginx", "-p", str(made.dir), "-c", str(made.dir / "nginx.conf")]
        started.append(subprocess.Popen(nginx, stderr=subprocess.DEVNULL, text=True))
        told = {
            "settings": {"address": "10.77.0.1", "port": PORT, "loops": 1,
                         "trust_file": str(made.dir / "origin-ca.pem")},
            "directory": str(made.dir / "egress"),
            "names": {HOST: [ORIGIN], "other.test": [ORIGIN], "own.test": [OWN]},
            "audit": True,
            "policies": [["inst-a", "10.77.0.2", {"API_KEY": {
                "source": {"env": "K"},
                "inject": [{"hosts": [HOST, "own.test"],
                            "as": {"header": "Authorization", "format": "Bearer ${value}"}}],
            }}, {"K": SECRET}]],
        }  # fmt: skip
        argv = ["ip", "netns", "exec", made.host, sys.executable, "-m", "tests.egress.proxy_process", json.dumps(told)]
        root = str(Path(__file__).parents[2])
        proxy = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        started.append(proxy)
        assert proxy.stdout is not None
        ready = msgspec.json.decode(proxy.stdout.readline())
        (made.dir / "ca.pem").write_text(ready["ca"])
        both = ready["ca"] + (made.dir / "origin-ca.pem").read_text()
        (made.dir / "bundle.pem").write_text(both)
        wait_for_nginx(made)
        yield made
    finally:
        for process in started:
            if process.stdin:
                process.stdin.close()
            process.terminate()
            process.wait(20)
            if process.stdout:
                process.stdout.close()
        for name in (made.guest, made.host, made.world):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(made.etc, ignore_errors=True)


def wait_for_nginx(lab: Lab) -> None:
    run("ip", "netns", "exec", lab.world, "curl", "-sk", "--retry", "40", "--retry-connrefused", "--retry-delay", "1",
        f"https://{ORIGIN}/")  # fmt: skip


def curl(lab: Lab, *argv: str) -> str:
    return lab.in_guest("curl", "-sS", "--cacert", str(lab.dir / "bundle.pem"), *argv)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(lab: Lab, version: str) -> None:
    """The second finds the first one's connection in the pool, and must not be led over it: it wants HTTP/2."""
    said = curl(lab, version, f"https://{HOST}/", "-H", "Authorization: Bearer mock-API_KEY")
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
    said = lab.in_guest("curl", "-sS", "--cacert", str(lab.dir / "origin-ca.pem"), f"https://{ORIGIN}/")
    assert said == f"auth= proto=HTTP/2.0 host={ORIGIN} scheme=https\n"


def test_own_address_of_the_host(lab: Lab) -> None:
    """A public address, but the host's: refused without being configured."""
    said = curl(lab, "https://own.test/")
    assert json.loads(said)["error"]["code"] == "address_denied"


def test_explicit_proxy_as_well(lab: Lab) -> None:
    said = lab.in_guest("curl", "-sS", "--cacert", str(lab.dir / "bundle.pem"), f"https://{HOST}/",
                        https_proxy=f"http://10.77.0.1:{PORT}")  # fmt: skip
    assert f"auth=Bearer {SECRET}" in said


def test_python(lab: Lab) -> None:
    code = f"import urllib.request as u; print(u.urlopen('https://{HOST}/').read().decode())"
    for proxy in ({}, {"https_proxy": f"http://10.77.0.1:{PORT}"}):
        said = lab.in_guest(sys.executable, "-c", code, SSL_CERT_FILE=str(lab.dir / "bundle.pem"), **proxy)
        assert f"auth=Bearer {SECRET}" in said


def test_httpx(lab: Lab) -> None:
    code = f"import httpx; print(httpx.get('https://{HOST}/').text)"
    said = lab.in_guest(sys.executable, "-c", code, SSL_CERT_FILE=str(lab.dir / "bundle.pem"))
    assert f"auth=Bearer {SECRET}" in said


def test_node(lab: Lab) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    code = f"fetch('https://{HOST}/').then(r => r.text()).then(console.log)"
    said = lab.in_guest("node", "-e", code, NODE_EXTRA_CA_CERTS=str(lab.dir / "ca.pem"))
    assert f"auth=Bearer {SECRET}" in said


@pytest.mark.slow
def test_go(lab: Lab) -> None:
    """net/http picks HTTP/2 by itself."""
    go = shutil.which("go")
    if not go:
        pytest.skip("Go is not installed")
    source = lab.dir / "main.go"
    source.write_text(f"""package main
import ("fmt"; "io"; "net/http")
func main() {{
  for i := 0; i < 3; i++ {{
    r, err := http.Get("https://{HOST}/"); if err != nil {{ panic(err) }}
    b, _ := io.ReadAll(r.Body); r.Body.Close(); fmt.Print(r.Proto, " ", string(b))
  }}
}}
""")
    run(
        go, "build", "-o", str(lab.dir / "client"), str(source), env={**os.environ, "GOFLAGS": "-mod=mod"}, timeout=300
    )  # the first build of net/http takes its time
    said = lab.in_guest(str(lab.dir / "client"), SSL_CERT_FILE=str(lab.dir / "bundle.pem"))
    assert said.count(f"HTTP/2.0 auth=Bearer {SECRET} proto=HTTP/2.0") == 3


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
    lab.in_guest("git", "clone", "-q", f"https://{HOST}/repo.git", "clone", GIT_SSL_CAINFO=str(lab.dir / "bundle.pem"))
    assert (lab.dir / "clone" / ".git").is_dir()
