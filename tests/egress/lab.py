"""Real programs in a guest's place: network namespaces whose TCP to ports 80, 443 and those of databases is redirected.

    guest 10.77.0.2 ── host 10.77.0.1 (nft dnat to the proxy) ── world 93.184.216.x (real servers)

The programs need know nothing of a proxy; `proxied` gives them HTTP_PROXY and its like as well. The address that they
dial is a wrong one on purpose: the name decides.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trustme

from tests.egress.conftest import HOST, SECRET
from tests.egress.lab_moto import VALUE

ROOT = Path(__file__).parents[2]
PORT = 18080
PROXY = f"http://10.77.0.1:{PORT}"
OWN = "93.184.216.1"
NGINX = "93.184.216.34"
ELSEWHERE = "93.184.216.99"
"""What the guest takes every name for; nobody is there."""

GRPC_HOST = "grpc.example.com"
SOCKET_HOST = "ws.example.com"
STREAM_HOST = "sse.example.com"
GO_HOST = "go.example.com"
GIT_HOST = "git.example.com"
DATABASE_HOST = "db.example.com"
MYSQL_HOST = "mysql.example.com"
S3_HOST, TABLE_HOST = "s3.eu-west-1.amazonaws.com", "dynamodb.eu-west-1.amazonaws.com"
ORIGINS = {GRPC_HOST: "93.184.216.35", SOCKET_HOST: "93.184.216.36", STREAM_HOST: "93.184.216.37",
           GO_HOST: "93.184.216.38", GIT_HOST: "93.184.216.39", S3_HOST: "93.184.216.40",
           TABLE_HOST: "93.184.216.40", DATABASE_HOST: "93.184.216.41", MYSQL_HOST: "93.184.216.42"}  # fmt: skip
"""Hosts with a rule, as HOST and own.test are, and where their servers listen."""

RULES_WITH_SECRET = 3
"""Those below that have it as it is."""
BEARER_HOSTS = (GRPC_HOST, SOCKET_HOST, STREAM_HOST, GO_HOST)

NFT = f"""
table ip t {{
  chain pre {{ type nat hook prerouting priority -100;
    iifname "hg0" tcp dport {{ 80, 443, 5432, 3306 }} dnat to 10.77.0.1:{PORT}
  }}
}}
"""


def run(*argv: str, timeout: float = 60, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=timeout, **kwargs)  # type: ignore[call-overload,no-any-return]


class Lab:
    """The three namespaces, and the files that programs in them share: ca.pem, origin-ca.pem, both as bundle.pem."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        tag = f"eg{os.getpid()}"
        self.guest, self.host, self.world = (f"{tag}{each}" for each in "ghw")
        self.etc = Path("/etc/netns") / self.guest
        self._started: list[subprocess.Popen[str]] = []

    def in_guest(self, *argv: str, proxied: bool = False, **env: str) -> str:
        """What the program says; it must end well."""
        bundle = str(self.dir / "bundle.pem")
        merged = {"PATH": os.environ["PATH"], "HOME": str(self.dir), "SSL_CERT_FILE": bundle,
                  "REQUESTS_CA_BUNDLE": bundle, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": bundle, "GIT_SSL_CAINFO": bundle,
                  "CURL_CA_BUNDLE": bundle, "NODE_EXTRA_CA_CERTS": str(self.dir / "ca.pem")}  # fmt: skip
        if proxied:
            merged |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), PROXY)
        done = subprocess.run(["ip", "netns", "exec", self.guest, *argv], env=merged | env, cwd=self.dir,
                              capture_output=True, text=True, timeout=3600)  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def start(self, namespace: str, *argv: str, **kwargs: object) -> subprocess.Popen[str]:
        """A process that ends with the lab."""
        inside = ["ip", "netns", "exec", namespace, *argv]
        process = subprocess.Popen(inside, stdout=subprocess.PIPE, text=True, cwd=ROOT, **kwargs)  # type: ignore[call-overload]
        self._started.append(process)
        return process  # type: ignore[no-any-return]

    def build(self) -> None:
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(self.dir / "origin-ca.pem"))
        leaf = ca.issue_cert(HOST, "other.test", NGINX, *ORIGINS)
        leaf.private_key_and_cert_chain_pem.write_to_path(str(self.dir / "leaf.pem"))
        for name in (self.guest, self.host, self.world):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for one, of_one, other, of_other, a, b in (
            ("hg0", self.host, "eth0", self.guest, ["10.77.0.1"], ["10.77.0.2"]),
            ("hw0", self.host, "eth0", self.world, [OWN], [NGINX, *dict.fromkeys(ORIGINS.values())]),
        ):
            run("ip", "link", "add", one, "netns", of_one, "type", "veth", "peer", "name", other, "netns", of_other)
            for name, link, addresses in ((of_one, one, a), (of_other, other, b)):
                for address in addresses:
                    run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
                run("ip", "-n", name, "link", "set", link, "up")
        run("ip", "-n", self.guest, "route", "add", "default", "via", "10.77.0.1")
        run("ip", "netns", "exec", self.host, "nft", "-f", "-", input=NFT)
        self.etc.mkdir(parents=True)
        (self.etc / "hosts").write_text(
            f"127.0.0.1 localhost\n{ELSEWHERE} {HOST} other.test own.test {' '.join(ORIGINS)}\n"
        )
        (self.etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody: refused at once
        self._start_proxy()

    def _start_proxy(self) -> None:
        told = {
            "settings": {"address": "10.77.0.1", "port": PORT, "loops": 1,
                         "trust_file": str(self.dir / "origin-ca.pem")},
            "directory": str(self.dir / "egress"),
            "names": {HOST: [NGINX], "other.test": [NGINX], "own.test": [OWN],
                      **{name: [address] for name, address in ORIGINS.items()}},
            "policies": [["inst-a", "10.77.0.2", {"API_KEY": {
                "source": {"env": "K"},
                "inject": [{"hosts": [HOST, "own.test", *BEARER_HOSTS],
                            "as": {"header": "Authorization", "format": "Bearer ${value}"}}],
            }, "GIT": {
                "source": {"env": "K"},
                "inject": [{"hosts": [GIT_HOST], "as": {"basic": {"username": "x-access-token"}}}],
            }, "AWS": {
                "source": {"env": "AWS_KEYS"},
                "inject": [{"hosts": [host], "as": {"sigv4": {"region": "eu-west-1", "service": service}}}
                           for host, service in ((S3_HOST, "s3"), (TABLE_HOST, "dynamodb"))],
            }, "PGPASSWORD": {
                "source": {"env": "K"},
                "inject": [{"hosts": [DATABASE_HOST], "as": {"postgres": {"user": "app"}}}],
            }, "MYSQL_PWD": {
                "source": {"env": "K"},
                "inject": [{"hosts": [MYSQL_HOST], "as": {"mysql": {"user": "app"}}}],
            }}, {"K": SECRET, "AWS_KEYS": VALUE}]],
        }  # fmt: skip
        proxy = self.start(self.host, sys.executable, "-m", "tests.egress.proxy_process", json.dumps(told),
                           stdin=subprocess.PIPE)  # fmt: skip
        assert proxy.stdout is not None
        ready = msgspec.json.decode(proxy.stdout.readline())
        self.proxy = ready["pid"]
        (self.dir / "ca.pem").write_text(ready["ca"])
        (self.dir / "bundle.pem").write_text(ready["ca"] + (self.dir / "origin-ca.pem").read_text())

    def remove(self) -> None:
        for process in reversed(self._started):
            if process.stdin:
                process.stdin.close()
            process.terminate()
            process.wait(20)
            if process.stdout:
                process.stdout.close()
        for name in (self.guest, self.host, self.world):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self.etc, ignore_errors=True)


@contextmanager
def a_lab(directory: Path) -> Iterator[Lab]:
    for tool in ("ip", "nft"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Lab(directory)
    try:
        made.build()
        yield made
    finally:
        made.remove()
