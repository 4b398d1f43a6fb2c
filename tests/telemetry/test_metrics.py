"""Metrics under the names that dashboards know."""

from __future__ import annotations

import pytest

from hypeman.telemetry import metrics

NAMES = """
hypeman_info hypeman_uptime_seconds hypeman_http_requests_total hypeman_http_request_duration_seconds
hypeman_images_pulls_total hypeman_images_build_duration_seconds hypeman_instances_create_duration_seconds
hypeman_instances_start_duration_seconds hypeman_instances_stop_duration_seconds
hypeman_instances_standby_duration_seconds hypeman_instances_restore_duration_seconds
hypeman_instances_state_transitions_total hypeman_network_tap_operations_total
hypeman_volumes_create_duration_seconds hypeman_vmm_api_duration_seconds hypeman_vmm_api_errors_total
hypeman_exec_sessions_total hypeman_exec_duration_seconds hypeman_exec_bytes_sent_total
hypeman_exec_bytes_received_total hypeman_cp_sessions_total hypeman_cp_duration_seconds hypeman_cp_bytes_total
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_names(name: str) -> None:
    assert f"# TYPE {name} " in metrics.render_metrics().decode()


def test_gauges_are_asked_for_at_each_look() -> None:
    count = 0

    def ask() -> dict[tuple[str, ...], float]:
        nonlocal count
        count += 1
        return {("Running",): 3.0 + count, ("Stopped",): 1.0}

    metrics.register_gauge("hypeman_test_total", "For this test", ("state",), ask)
    assert b'hypeman_test_total{state="Running"} 4.0' in metrics.render_metrics()
    assert b'hypeman_test_total{state="Running"} 5.0' in metrics.render_metrics()


def test_requests_are_counted_by_route() -> None:
    metrics.count_request("GET", "/instances/{id}", 200, 0.002)
    assert b'hypeman_http_requests_total{method="GET",path="/instances/{id}",status="200"}' in metrics.render_metrics()


def test_made_up_methods_are_one() -> None:
    for number in range(3):
        metrics.count_request(f"MADEUP{number}", "unknown", 404, 0.001)
    assert b'method="other",path="unknown",status="404"} 3.0' in metrics.render_metrics()
    assert b"MADEUP" not in metrics.render_metrics()
