"""Traces over HTTP: which calls are traced, and for whom."""

from __future__ import annotations

from typing import Any

import pytest

from hypeman.telemetry import traces
from tests.fakes.services import FakeWorld

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def nothing_before() -> None:
    """The recorder is the process's."""
    traces.RECORDER.keep(0)
    traces.RECORDER.keep(256)


async def test_calls_that_change_something_are_traced(ask: Any, world: FakeWorld) -> None:
    world.instances.add("web")
    assert (await ask("POST", "/instances/web/stop", headers={"traceparent": CALLER})).status_code == 200
    assert (await ask("GET", "/instances/web")).status_code == 200
    assert (await ask("DELETE", "/instances/missing", headers={"Idempotency-Key": "k"})).status_code == 404
    gone, stopped = await (await ask("GET", "/traces")).get_json()
    assert (stopped["name"], stopped["id"]) == ("POST /instances/{id}/stop", "0af7651916cd43dd8448eb211c80319c")
    assert stopped["spans"][0]["attributes"]["http.route"] == "/instances/{id}/stop"
    assert "error" not in stopped and gone["error"].startswith("NotFound: ")
    assert await (await ask("GET", "/traces?limit=1")).get_json() == [gone]
    assert await (await ask("GET", "/traces?instance=web")).get_json() == []
    assert (await ask("GET", "/traces?limit=1000")).status_code == 400


async def test_where_the_host_keeps_its_files_is_not_shown(ask: Any) -> None:
    with pytest.raises(OSError), traces.operation("POST /volumes"), traces.span("MakeDisk"):
        raise OSError("/var/lib/hypeman/volumes/v1/disk: no space")
    (failed,) = await (await ask("GET", "/traces")).get_json()
    assert [failed["error"], *(span["error"] for span in failed["spans"])] == ["OSError: disk: no space"] * 3
