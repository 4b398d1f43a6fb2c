"""A real server's metrics, as the dashboard asks for them, and its export to a receiver of OTLP. No guest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.real.appliance import Appliance, check_host, short_directory
from tests.real.kind import PATIENCE
from tests.telemetry.test_monitoring import QUERIES, series_of

RECEIVER = """
import gzip, http.server, json, sys
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(gzip.decompress(self.rfile.read(int(self.headers["Content-Length"]))))
        with open(sys.argv[1], "a") as file:
            file.write(json.dumps([self.path, body]) + chr(10))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", 4318), Receiver)
print("ready", flush=True)
server.serve_forever()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("telemetry")


async def test_metrics_and_export(directory: Path) -> None:
    received = directory / "received"
    received.touch()
    appliance = Appliance(
        directory, METRICS__ENABLED="true", OTLP__ENDPOINT="http://127.0.0.1:4318", OTLP__METRICS_INTERVAL="1"
    )
    try:
        with appliance.namespace.serving(RECEIVER, str(received)):
            await appliance.start()
            await appliance.post("/volumes", {"name": "data", "size_gb": 1})
            [trace] = await appliance.get("/traces")
            text = appliance.namespace.run("curl", "-sS", "http://127.0.0.1:9464/metrics")
            offered = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
            asked = {name for query in QUERIES for name, _ in series_of(query)}
            assert {name for name in asked if not {name, *stems(name)} & offered} == set()
            assert "hypeman_volumes_allocated_bytes 1.073741824e+09" in text
            [used] = re.findall(r"^hypeman_volumes_used_bytes (\S+)$", text, re.MULTILINE)
            assert 0 < float(used) < 1 << 30  # an empty file system on a sparse disk
            with trio.fail_after(PATIENCE):
                while {"/v1/traces", "/v1/metrics"} - {path for path, _ in got(received)}:
                    await trio.sleep(0.1)
                while trace["id"] not in trace_ids(received):
                    await trio.sleep(0.1)
    finally:
        appliance.close()


def trace_ids(received: Path) -> list[str]:
    bodies = [body for path, body in got(received) if path == "/v1/traces"]
    return [span["traceId"] for body in bodies for span in body["resourceSpans"][0]["scopeSpans"][0]["spans"]]


def stems(name: str) -> list[str]:
    """The family of a histogram's series."""
    return [name.removesuffix(suffix) for suffix in ("_bucket", "_sum", "_count")]


def got(received: Path) -> list[Any]:
    return [json.loads(line) for line in received.read_text().splitlines() if line.endswith("]")]
