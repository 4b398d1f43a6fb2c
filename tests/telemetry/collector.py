"""The OpenTelemetry collector, as a receiver for what the server exports.

``python -m tests.telemetry.collector`` builds it (`make test-conformance` does): a minute of CPU time, once.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

VERSION, STABLE = "v0.140.0", "v1.46.0"
"""Of one release: its modules below 1.0, and those that are stable."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hypeman-build" / f"collector-{VERSION}"
PROGRAM = CACHE / "collector"
_MODULES = (
    f"otelcol@{VERSION}",
    f"receiver/otlpreceiver@{VERSION}",
    f"exporter/debugexporter@{VERSION}",
    f"confmap/provider/yamlprovider@{STABLE}",
)
CONFIG = """
receivers: {otlp: {protocols: {http: {endpoint: "127.0.0.1:4318"}}}}
exporters: {debug: {verbosity: detailed, use_internal_logger: false}}
service:
  telemetry: {metrics: {level: none}}
  pipelines:
    traces: {receivers: [otlp], exporters: [debug]}
    metrics: {receivers: [otlp], exporters: [debug]}
"""


def build() -> None:
    if PROGRAM.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "main.go").write_bytes((Path(__file__).parent / "collector.go").read_bytes())
    (CACHE / "go.mod").write_text("module collector\n")
    for command in (
        ["get", *(f"go.opentelemetry.io/collector/{module}" for module in _MODULES)],
        ["build", "-o", str(PROGRAM), "."],
    ):
        subprocess.run(["go", *command], cwd=CACHE, check=True)


if __name__ == "__main__":
    build()
