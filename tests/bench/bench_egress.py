"""CPU and memory that mediating costs, against others doing the same rewrite on the same core: nginx, and where they
are installed haproxy, Go's ReverseProxy (a toolchain builds it) and mitmproxy.

Origin and load run on core 0, the proxy alone on core 1, one worker each. What counts is the proxy's CPU time from
schedstat divided by requests: on a shared machine it moves by a few per cent where requests a second move by half.
Every proxy ends TLS with a leaf for the name, sets Authorization, verifies the origin's certificate and keeps
connections to it. The peers are tuned: buffering off, big buffers, keep-alive without end, no logs. Ours records
every request in its audit ring.

    python -m tests.bench.bench_egress [round milliseconds]
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trustme

from tests.bench.harness import Result, compare, process_memory

HERE = Path(__file__).parent
HOST = "api.example.com"
ROUND_MS = 1200

TESTS = {
    "1 KB, kept alive": (["/1k", "64"], []),
    "1 KB, new TLS connection each": (["/1k", "32"], ["new"]),
    "1 MB down": (["/1m", "8"], []),
    "1 MB up": (["/up", "8"], ["1048576"]),
}

COMMON = """
daemon off; worker_processes 1; pid {dir}/{name}.pid; error_log {dir}/{name}.error; worker_cpu_affinity {mask};
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; sendfile on; tcp_nodelay on; client_max_body_size 0; default_type x/y;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
  scgi_temp_path {dir}/s; ssl_session_tickets on;
"""
ORIGIN = (
    COMMON
    + """
  server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {dir}/origin.pem; ssl_certificate_key {dir}/origin.pem;
    root {dir}/www; location /up {{ # read the whole body, then answer
      client_body_buffer_size 2m; proxy_pass_request_body off; proxy_set_header Content-Length "";
      proxy_http_version 1.1; proxy_set_header Connection ""; proxy_pass http://ok/; }} }}
  upstream ok {{ server unix:{dir}/ok.sock; keepalive 64; }}
  server {{ listen unix:{dir}/ok.sock; return 200 "ok"; }}
}}
"""
)
PROXY = (
    COMMON
    + """
  upstream o {{ server 127.0.0.1:{origin}; keepalive 512; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port} ssl http2; ssl_certificate {dir}/leaf.pem; ssl_certificate_key {dir}/leaf.pem;
    location / {{
      proxy_pass https://o; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
      proxy_set_header Authorization "Bearer real"; proxy_buffering off; proxy_buffer_size 64k; proxy_buffers 4 64k;
      proxy_request_buffering off; proxy_max_temp_file_size 0; proxy_ssl_verify on; proxy_ssl_name {host};
      proxy_ssl_trusted_certificate {dir}/origin-ca.pem; proxy_ssl_server_name on;
    }} }}
}}
"""
)
HAPROXY = """
global
  nbthread 1
  tune.bufsize 65536
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
  http-reuse always
frontend f
  bind 127.0.0.1:{port} ssl crt {dir}/leaf.pem alpn h2,http/1.1
  http-request set-header Authorization "Bearer real"
  default_backend b
backend b
  default-server ssl verify required ca-file {dir}/origin-ca.pem sni str({host}) verifyhost {host} pool-max-conn 512
  server o 127.0.0.1:{origin}
"""


CONNECTIONS = 300
"""Idle ones, when memory is measured."""
NAMES = 300
"""Hosts that a certificate is made for, when memory is measured; fewer than the cache holds."""

ROUNDS = {"nginx": 5, "haproxy": 5, "Go": 3, "mitmproxy": 1}
"""The farther from us, the fewer."""

WITH_RULES = "hypeman with rules"
RULES = {
    "default": "deny",
    "rules": [
        *({"action": "allow", "hosts": [f"h{number}.rules.test"], "methods": ["GET"], "paths": ["/v1/*"]}
          for number in range(999)),
        {"action": "allow", "hosts": [HOST], "methods": ["GET", "POST"]},
    ],
}  # fmt: skip
"""1,000 rules on destinations, of which the last one allows the requests."""

HTTP2 = "1 KB, HTTP/2, 8 connections of 8 streams"
"""Loaded by h2load where it is installed; the origin speaks HTTP/1."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_port(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on {port}")


def tree(pid: int) -> list[int]:
    """The process and its children, whichever of its threads started them."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                for child in (task / "children").read_text().split()]  # fmt: skip
    return [pid, *(grand for child in children for grand in tree(child))]


def cpu_ns(pid: int) -> int:
    """CPU time of a process with its threads and children."""
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for each in tree(pid)
        for task in Path(f"/proc/{each}/task").iterdir()
    )


@contextmanager
def running(argv: list[str], core: int, **kwargs: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(["taskset", "-c", str(core), *argv], text=True, **kwargs)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.stdin:
            process.stdin.close()
        process.terminate()
        process.wait(10)


class Bench:
    """An origin, the proxies, and how to measure one of them."""

    origin_text, proxy_text = ORIGIN, PROXY
    tests = TESTS
    under: Sequence[str] = ()
    """What nginx, and the engine of an ingress, are run by."""

    def __init__(self, stack: ExitStack, round_ms: int) -> None:
        self.round_ms = round_ms
        self.dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.pids: dict[str, tuple[int, int]] = {}
        self._certificates()
        www = self.dir / "www"
        www.mkdir()
        self.dir.chmod(0o755)
        (www / "1k").write_bytes(bytes(1024))
        (www / "1m").write_bytes(bytes(1 << 20))
        subprocess.run(["cc", "-O2", "-o", self.dir / "load", HERE / "egress_load.c", "-lssl", "-lcrypto"], check=True)
        self.origin = free_port()
        self._nginx(stack, "origin", self.origin_text, self.origin, 0)
        port = free_port()
        self.pids["nginx"] = (self._nginx(stack, "nginx", self.proxy_text, port, 1), port)
        self._ours(stack)
        if shutil.which("haproxy"):
            self._haproxy(stack)
        if shutil.which("go"):
            self._go(stack)
        if shutil.which("mitmdump"):
            self._mitmproxy(stack)
        self.peers = [name for name in ROUNDS if name in self.pids]

    def _certificates(self) -> None:
        self.ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.ca.cert_pem.write_to_path(str(self.dir / "origin-ca.pem"))
        front = trustme.CA(key_type=trustme.KeyType.ECDSA)
        front.cert_pem.write_to_path(str(self.dir / "front-ca.pem"))
        for name, by in (("origin", self.ca), ("leaf", front)):
            leaf = by.issue_cert(HOST, key_type=trustme.KeyType.ECDSA)
            pem = leaf.private_key_pem.bytes() + leaf.cert_chain_pems[0].bytes()
            (self.dir / f"{name}.pem").write_bytes(pem)

    def _nginx(self, stack: ExitStack, name: str, text: str, port: int, core: int) -> int:
        path = self.dir / f"{name}.conf"
        path.write_text("user root;" + text.format(dir=self.dir, name=name, port=port, origin=self.origin, host=HOST,
                                                   mask="01" if core == 0 else "10"))  # fmt: skip
        under = self.under if name == "nginx" else ()
        if under:  # the one process that valgrind sees is the worker
            path.write_text("master_process off;" + path.read_text())
        process = stack.enter_context(running([*under, "nginx", "-p", str(self.dir), "-c", str(path)], core,
                                              stderr=subprocess.DEVNULL))  # fmt: skip
        wait_port(port)
        return process.pid

    def _haproxy(self, stack: ExitStack) -> None:
        port = free_port()
        path = self.dir / "haproxy.cfg"
        path.write_text(HAPROXY.format(dir=self.dir, port=port, origin=self.origin, host=HOST))
        process = stack.enter_context(running(["haproxy", "-f", str(path)], 1, stderr=subprocess.DEVNULL))
        wait_port(port)
        self.pids["haproxy"] = (process.pid, port)

    def _go(self, stack: ExitStack) -> None:
        port, program = free_port(), str(self.dir / "egress-go")
        subprocess.run(["go", "build", "-o", program, HERE / "egress_go.go"], check=True)
        argv = [program, f"127.0.0.1:{port}", str(self.dir / "leaf.pem"), f"127.0.0.1:{self.origin}", HOST,
                str(self.dir / "origin-ca.pem")]  # fmt: skip
        process = stack.enter_context(running(argv, 1, env={**os.environ, "GOMAXPROCS": "1"}))
        wait_port(port)
        self.pids["Go"] = (process.pid, port)

    def _mitmproxy(self, stack: ExitStack) -> None:
        port = free_port()
        argv = ["mitmdump", "-q", "--mode", f"reverse:https://127.0.0.1:{self.origin}", "--listen-host", "127.0.0.1",
                "--listen-port", str(port), "--certs", f"*={self.dir / 'leaf.pem'}", "--modify-headers",
                "/~q/Authorization/Bearer real"]  # fmt: skip
        settings = {"flow_detail": "0", "http2": "false", "keep_host_header": "true", "connection_strategy": "lazy",
                    "ssl_verify_upstream_trusted_ca": str(self.dir / "origin-ca.pem"),
                    "confdir": str(self.dir / "mitm")}  # fmt: skip
        argv += [f"--set={name}={value}" for name, value in settings.items()]
        process = stack.enter_context(running(argv, 1, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_port(port)
        self.pids["mitmproxy"] = (process.pid, port)

    def _ours(self, stack: ExitStack) -> None:
        self._engine(stack, "hypeman")
        self._engine(stack, WITH_RULES, RULES)

    def _engine(self, stack: ExitStack, name: str, *rules: object) -> None:
        reported = {
            "settings": {"address": "127.0.0.1", "port": 0, "loops": 1, "allow": ["127.0.0.0/8"],
                         "trust_file": str(self.dir / "origin-ca.pem"), "assumed_tls_port": self.origin,
                         "limits": {"mints_per_second": 0}},
            "directory": str(self.dir / name.replace(" ", "-")), "names": {HOST: ["127.0.0.1"]},
            "policies": [["inst-a", "127.0.0.1", {"API_KEY": {"source": {"env": "K"}, "inject": [
                {"hosts": [HOST, "*.names.test"],
                 "as": {"header": "Authorization", "format": "Bearer ${value}"}}]}}, {"K": "real"}, *rules]],
        }  # fmt: skip
        argv = [sys.executable, "-m", "tests.egress.proxy_process", json.dumps(reported)]
        process = stack.enter_context(running(argv, 1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                              cwd=HERE.parents[1]))  # fmt: skip
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        (self.dir / f"{name}-ca.pem").write_text(ready["ca"])
        self.pids[name] = (process.pid, ready["port"])

    def load(self, proxy: str, test: str) -> Callable[[], int]:
        """Makes requests of one test for a round; how many."""
        port = self.pids[proxy][1]
        (path, connections), more = self.tests[test]
        ca = self.dir / (f"{proxy}-ca.pem" if proxy.startswith("hypeman") else "front-ca.pem")
        argv = [
            "taskset",
            "-c",
            "0",
            str(self.dir / "load"),
            str(port),
            HOST,
            path,
            connections,
            str(self.round_ms),
            *more,
        ]

        def make() -> int:
            result = subprocess.run(argv, env={**os.environ, "CA": str(ca)}, check=True, capture_output=True, text=True)
            requests, errors = map(int, result.stdout.split())
            if errors or not requests:
                raise RuntimeError(f"{proxy}, {test}: {requests} requests, {errors} errors")
            return requests

        return make

    def cost(self, proxy: str, test: str) -> Callable[[], float]:
        """Measures µs of the proxy's CPU per request of one test."""
        load, pid = self.load(proxy, test), self.pids[proxy][0]

        def measure() -> float:
            before = cpu_ns(pid)
            requests = load()
            return (cpu_ns(pid) - before) / 1000 / requests

        return measure

    def cost_http2(self, proxy: str) -> Callable[[], float]:
        """The same under HTTP/2."""
        pid, port = self.pids[proxy]
        count = self.round_ms * 5
        argv = ["taskset", "-c", "0", "h2load", "-c", "8", "-m", "8", "-n", str(count),
                f"--connect-to=127.0.0.1:{port}", f"https://{HOST}:{self.origin}/1k"]  # fmt: skip

        def measure() -> float:
            before = cpu_ns(pid)
            output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            if f"status codes: {count} 2xx" not in output:
                raise RuntimeError(f"{proxy}, HTTP/2: {output}")
            return (cpu_ns(pid) - before) / 1000 / count

        return measure

    def held(self, proxy: str) -> int:
        return sum(process_memory(each) for each in tree(self.pids[proxy][0]))

    def connect(self, proxy: str, name: str) -> ssl.SSLSocket:
        context = ssl.create_default_context(
            cafile=self.dir / (f"{proxy}-ca.pem" if proxy == "hypeman" else "front-ca.pem")
        )
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.pids[proxy][1])), server_hostname=name)

    def per_connection(self, proxy: str) -> float:
        """KB held for a connection that has asked once and is kept open."""
        ask = f"GET /1k HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
        with ExitStack() as stack:
            before = 0
            for number in range(CONNECTIONS + 20):  # what the first ones bring along belongs to none
                if number == 20:
                    before = self.held(proxy)
                sock = stack.enter_context(self.connect(proxy, HOST))
                sock.sendall(ask)
                got = b""
                while not got.endswith(bytes(1024)):
                    got += sock.recv(65536)
            return (self.held(proxy) - before) / 1024 / CONNECTIONS

    def per_name(self) -> float:
        """KB held for a name that a certificate was made for."""
        before = 0
        for number in range(NAMES + 20):
            if number == 20:
                before = self.held("hypeman")
            self.connect("hypeman", f"h{number}.names.test").close()
        return (self.held("hypeman") - before) / 1024 / NAMES


def run(round_ms: int = ROUND_MS) -> list[Result]:
    if not shutil.which("nginx") or (os.cpu_count() or 1) < 2:
        return []
    with ExitStack() as stack:
        bench = Bench(stack, round_ms)
        results = [Result("egress, memory of a minted name", bench.per_name(), "KB")]
        held = {name: bench.per_connection(name) for name in ("hypeman", *bench.peers)}
        for peer in bench.peers:
            name = f"egress, memory of an idle connection, {peer}"
            results.append(Result(name, held["hypeman"], "KB", peer, held[peer]))
        for test in TESTS:
            for peer in bench.peers:
                ours, theirs = bench.cost("hypeman", test), bench.cost(peer, test)
                results.append(compare(f"egress, {test}, {peer}", "µs CPU/request", ours, peer, theirs, ROUNDS[peer]))
        kept = next(iter(TESTS))
        with_rules, without = bench.cost(WITH_RULES, kept), bench.cost("hypeman", kept)
        results.append(compare(f"egress, {kept}, 1,000 rules", "µs CPU/request", with_rules, "none", without))
        for peer in [name for name in bench.peers if name != "mitmproxy" and shutil.which("h2load")]:
            ours, theirs = bench.cost_http2("hypeman"), bench.cost_http2(peer)
            results.append(compare(f"egress, {HTTP2}, {peer}", "µs CPU/request", ours, peer, theirs, ROUNDS[peer]))
    return results


if __name__ == "__main__":
    for result in run(*(int(each) for each in sys.argv[1:])):
        peer = f"{result.peer} {result.peer_value or 0:.1f}  ratio {result.ratio or 0:.2f}" if result.peer else ""
        print(f"{result.name:60} {result.value:9.1f} {result.unit}  {peer}")
