"""CPU that a request by an ingress costs, against nginx, and Caddy where it is installed, doing the same on the same
core: TLS ends, the request goes on in plain HTTP/1.1 with forwarding headers, connections are kept on both sides.

Measured as in bench_egress. Ours is the whole product: server and engine, with counters and, unless the row says
otherwise, a line of the access log for each request; nginx writes no log.

    python -m tests.bench.bench_ingress [round milliseconds]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from tests.bench.bench_egress import (
    COMMON,
    HERE,
    HOST,
    HTTP2,
    ROUND_MS,
    ROUNDS,
    TESTS,
    Bench,
    free_port,
    running,
    wait_port,
)
from tests.bench.harness import Result, compare

CADDY_ROUNDS = 3

GUEST = (
    COMMON
    + """
  server {{ listen 127.0.0.1:{port}; root {dir}/www; location /up {{ # read the whole body, then answer
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
      proxy_pass http://o; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header X-Forwarded-Host $host; proxy_buffering off; proxy_buffer_size 64k; proxy_buffers 4 64k;
      proxy_request_buffering off; proxy_max_temp_file_size 0;
    }} }}
}}
"""
)


CADDY = """
{{
  admin off
  auto_https off
  storage file_system {dir}/caddy
}}
https://{host}:{port} {{
  tls {dir}/leaf.pem {dir}/leaf.pem
  reverse_proxy 127.0.0.1:{origin}
}}
"""


class IngressBench(Bench):
    origin_text, proxy_text = GUEST, PROXY
    logs: Sequence[bool] = (True, False)

    def caddy(self, stack: ExitStack) -> None:
        port, path = free_port(), self.dir / "Caddyfile"
        path.write_text(CADDY.format(dir=self.dir, host=HOST, port=port, origin=self.origin))
        argv = ["caddy", "run", "--adapter", "caddyfile", "--config", str(path)]
        process = stack.enter_context(running(argv, 1, env={**os.environ, "GOMAXPROCS": "1", "HOME": str(self.dir)},
                                              stderr=subprocess.DEVNULL))  # fmt: skip
        wait_port(port)
        self.pids["Caddy"] = (process.pid, port)

    def _ours(self, stack: ExitStack) -> None:
        shutil.copy(self.dir / "front-ca.pem", self.dir / "hypeman-ca.pem")
        for log in self.logs:
            name = "hypeman" if log else "hypeman without log"
            port = free_port()
            directory = self.dir / name.replace(" ", "-")
            directory.mkdir()
            reported = {"directory": str(directory), "host": HOST, "port": port, "target_port": self.origin,
                    "certificate": str(self.dir / "leaf.pem"), "log": log, "under": self.under}  # fmt: skip
            argv = [sys.executable, "-m", "tests.ingress.ingress_process", json.dumps(reported)]
            process = stack.enter_context(running(argv, 1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                  cwd=HERE.parents[1]))  # fmt: skip
            assert process.stdout is not None
            json.loads(process.stdout.readline())
            self.pids[name] = (process.pid, port)


def run(round_ms: int = ROUND_MS) -> list[Result]:
    if not shutil.which("nginx") or (os.cpu_count() or 1) < 2:
        return []
    with ExitStack() as stack:
        bench = IngressBench(stack, round_ms)
        results = []
        if shutil.which("caddy"):
            bench.caddy(stack)
            for test in TESTS:
                costs = bench.cost("hypeman without log", test), bench.cost("Caddy", test)
                name = f"ingress, {test}, without log, Caddy"
                results.append(compare(name, "µs CPU/request", costs[0], "Caddy", costs[1], CADDY_ROUNDS))
        for ours, note in (("hypeman", ""), ("hypeman without log", ", without log")):
            for test in TESTS:
                costs = bench.cost(ours, test), bench.cost("nginx", test)
                name = f"ingress, {test}{note}, nginx"
                results.append(compare(name, "µs CPU/request", costs[0], "nginx", costs[1], ROUNDS["nginx"]))
        if shutil.which("h2load"):
            ours_h2, nginx_h2 = bench.cost_http2("hypeman without log"), bench.cost_http2("nginx")
            name = f"ingress, {HTTP2}, without log, nginx"
            results.append(compare(name, "µs CPU/request", ours_h2, "nginx", nginx_h2, ROUNDS["nginx"]))
    return results


if __name__ == "__main__":
    for result in run(*(int(each) for each in sys.argv[1:])):
        print(
            f"{result.name:60} {result.value:9.1f} {result.unit}  {result.peer} {result.peer_value or 0:.1f}  "
            f"ratio {result.ratio or 0:.2f}"
        )
