"""``hypeman trace``: an operation as a tree of phases."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hypeman.telemetry import traces
from hypeman.telemetry.traces import operation, span


@pytest.fixture(autouse=True)
def nothing_before() -> None:
    """The recorder is the process's."""
    traces.RECORDER.keep(0)
    traces.RECORDER.keep(256)


def test_last(cli: Any) -> None:
    assert cli("trace", "last").stdout == "no operation is remembered\n"
    with operation("POST /instances"), span("work", {traces.INSTANCE_NAME: "web"}):
        with span("MakeDisks"):
            pass
        with pytest.raises(RuntimeError), span("LaunchVmm"):
            raise RuntimeError("no memory")
    with operation("DELETE /images/{name}"):
        pass
    head, work, disks, launch = cli("trace", "last", "web").stdout.splitlines()
    assert head.startswith("POST /instances  web  ")
    assert [line[:14].rstrip() for line in (work, disks, launch)] == ["  work", "    MakeDisks", "    LaunchVmm"]
    assert "━" in disks and launch.endswith("RuntimeError: no memory")
    assert cli("trace", "last").stdout.startswith("DELETE /images/{name}")
    assert len(json.loads(cli("trace", "last", "-n", "5", "-o", "json").stdout)) == 2
