"""A real server's telemetry, judged by others: promtool, and the OpenTelemetry collector. `make test-conformance`.

Wants root, Debian's package ``prometheus`` and a collector built by ``python -m tests.telemetry.collector``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from tests.real.appliance import Appliance, Namespace, check_host, short_directory
from tests.real.kind import PATIENCE
from tests.telemetry.collector import CONFIG, PROGRAM
from tests.telemetry.test_monitoring import FOLDER, dashboard_queries

ALERTS = FOLDER / "alerts.yml"
UP = "label_values("


def fires(name: str, at: str, labels: str) -> dict[str, Any]:
    """A test of promtool's: at that time the alert fires with ``labels``; without them, it does not."""
    chosen = f'alertstate="firing",alertname="{name}"'
    samples = [{"labels": f"ALERTS{{{chosen},{labels}}}", "value": 1}] if labels else []
    return {"expr": f"ALERTS{{{chosen}}}", "eval_time": at, "exp_samples": samples}


UNIT_TEST = {
    "rule_files": [str(ALERTS)],
    "evaluation_interval": "1m",
    "tests": [
        {
            "interval": "1m",
            "input_series": [
                {"series": 'up{job="hypeman",instance="a"}', "values": "1 0 0 0 0 0"},
                {"series": 'hypeman_instances{state="Unknown",instance="a"}', "values": "0 2x20"},
                {"series": 'hypeman_disk_free_bytes{instance="a"}', "values": "5x30"},
                {"series": 'hypeman_limit_disk_bytes{instance="a"}', "values": "100x30"},
                {"series": 'hypeman_http_requests_total{status="200",instance="a"}', "values": "0+90x40"},
                {"series": 'hypeman_http_requests_total{status="500",instance="a"}', "values": "0+10x40"},
            ],
            "promql_expr_test": [
                fires("HypemanDown", "1m", ""),
                fires("HypemanDown", "5m", 'severity="critical",job="hypeman",instance="a"'),
                fires("HypemanInstanceUnknown", "15m", 'severity="warning",state="Unknown",instance="a"'),
                fires("HypemanDiskAlmostFull", "15m", 'severity="warning",instance="a"'),
                fires("HypemanErrors", "20m", 'severity="warning",instance="a"'),
                fires("HypemanGuestsSilent", "20m", ""),
            ],
        }
    ],
}


def promtool(*arguments: str, given: str = "") -> str:
    result = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("outside")


@contextmanager
def collecting(namespace: Namespace, output: Path) -> Iterator[None]:
    """The collector, printing into ``output``."""
    assert PROGRAM.exists(), "the collector is not built: `python -m tests.telemetry.collector`"
    with output.open("wb") as file:
        command = namespace.command(str(PROGRAM), "--config", f"yaml:{CONFIG}")
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


async def test_promtool_and_a_collector_take_what_a_server_offers(directory: Path) -> None:
    output = directory / "collector.log"
    appliance = Appliance(
        directory, METRICS__ENABLED="true", OTLP__ENDPOINT="http://127.0.0.1:4318", OTLP__METRICS_INTERVAL="1"
    )
    try:
        with collecting(appliance.namespace, output):
            await appliance.start()
            await appliance.post("/volumes", {"name": "data", "size_gb": 1})
            text = appliance.namespace.run("curl", "-sS", "http://127.0.0.1:9464/metrics")
            assert promtool("check", "metrics", given=text) == ""
            wanted = ("POST /volumes", "hypeman_http_request_duration_seconds", "hypeman_volumes")
            with trio.fail_after(PATIENCE):
                while not all(name in output.read_text() for name in wanted):
                    await trio.sleep(0.2)
    finally:
        log = appliance.log_tail(2000)
        appliance.close()
    assert "OpenTelemetry collector refuses" not in log


def test_the_alert_rules_are_valid_and_fire(tmp_path: Path) -> None:
    promtool("check", "rules", str(ALERTS))
    case = tmp_path / "case.yml"
    case.write_text(yaml.safe_dump(UNIT_TEST))
    assert "SUCCESS" in promtool("test", "rules", str(case))


def test_the_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "5m").replace("$host", ".*") for query in dashboard_queries()]
    rules = [
        {"record": f"query:{number}", "expr": query}
        for number, query in enumerate(queries)
        if not query.startswith(UP)  # Grafana's own function
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "--lint=none", str(file))
