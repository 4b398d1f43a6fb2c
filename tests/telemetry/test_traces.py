"""Traces: what belongs to which operation, what is kept, and what the lifecycle of an instance records."""

from __future__ import annotations

import pytest
import trio

from hypeman.errors import HypemanError
from hypeman.instances.model.types import InstanceState, StandbyInstanceRequest
from hypeman.paths import Paths
from hypeman.store import Store
from hypeman.telemetry import traces
from hypeman.telemetry.trace_types import OperationTrace
from hypeman.telemetry.traces import MAX_SPANS, Recorder, Span, operation, span, within
from tests.instances.fake_world import Lab, request

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(traces, "RECORDER", made)
    return made


def tree(trace: OperationTrace) -> dict[str, str]:
    """Name of each phase → name of the one that it is part of."""
    names = {each.id: each.name for each in trace.spans}
    return {each.name: names.get(each.parent, each.parent) for each in trace.spans}


def test_phases_belong_to_their_operation(recorder: Recorder) -> None:
    with span("outside") as nothing:
        assert nothing is None
    with operation("create", about={traces.INSTANCE: "i1", traces.INSTANCE_NAME: "web"}):
        with span("disks"), span("copy"):
            pass
        [open_one] = recorder.list()
        assert (open_one.duration_ms, tree(open_one)["copy"]) == (None, "disks")
        with pytest.raises(HypemanError), span("launch"):
            raise HypemanError("no memory; Bearer abcdef was refused\n")
    [trace] = recorder.list(instance="web")
    assert recorder.list(instance="i1") == [trace] and not recorder.list(instance="we")
    assert tree(trace) == {"create": "", "disks": "create", "copy": "disks", "launch": "create"}
    assert [each.error for each in trace.spans if each.error] == ["HypemanError: no memory; *** was refused\\n"]
    assert trace.duration_ms is not None
    assert max(each.begin_ms + (each.duration_ms or 0) for each in trace.spans) == pytest.approx(trace.duration_ms)


@pytest.mark.parametrize(
    ("header", "trace_id", "exported"),
    [
        (CALLER, "0af7651916cd43dd8448eb211c80319c", True),
        (CALLER[:-1] + "0", "0af7651916cd43dd8448eb211c80319c", False),
        ("", None, True),
        ("ff" + CALLER[2:], None, True),
        (CALLER.replace("b7ad6b7169203331", "0" * 16), None, True),
        (CALLER.upper(), None, True),
        ("00-1-2-01", None, True),
    ],
)
def test_a_callers_trace_is_continued(recorder: Recorder, header: str, trace_id: str | None, exported: bool) -> None:
    ended: list[Span] = []
    recorder.on_end = ended.append
    with operation("create", parent=header):
        pass
    [trace] = recorder.list()
    assert (trace.id == trace_id) is (trace_id is not None)
    assert trace.spans[0].parent == ("b7ad6b7169203331" if trace_id else "")
    assert len(ended) == exported


async def test_a_command_in_another_task_belongs_to_its_caller_and_a_leftover_task_does_not(recorder: Recorder) -> None:
    release = trio.Event()

    async def leftover() -> None:
        await release.wait()
        with span("much later"):
            pass

    async with trio.open_nursery() as nursery:
        with operation("create") as whole:
            nursery.start_soon(leftover)
        with within(whole), span("after the end"):
            pass
        release.set()
    assert [each.name for each in recorder.list()[0].spans] == ["create"]


def test_memory_is_bounded(recorder: Recorder) -> None:
    recorder.keep(3)
    for number in range(5):
        with operation(f"o{number}"):
            for _ in range(MAX_SPANS + 9):
                with span("phase"):
                    pass
    assert [trace.name for trace in recorder.list(limit=100)] == ["o4", "o3", "o2"]
    assert (len(recorder.list()[0].spans), recorder.list()[0].dropped_spans) == (MAX_SPANS, 10)
    recorder.keep(0)
    with operation("not kept"):
        pass
    assert recorder.list() == []


async def test_an_instance_leaves_its_steps(recorder: Recorder, store: Store, paths: Paths) -> None:
    lab = Lab(store, paths)
    async with lab.running() as instances:
        with operation("POST /instances"):
            await instances.create(request("one"))
        await instances.wait_state("one", InstanceState.RUNNING, 5)
        await instances.standby("one", StandbyInstanceRequest())
    standby, create = recorder.list(instance="one", limit=9)
    found = tree(create)
    assert (found["LaunchVmm"], found["work"], found["queued"]) == ("work", "POST /instances", "POST /instances")
    assert found["guest boot"] == "work"
    assert (standby.name, tree(standby)["SaveCapture"]) == ("standby", "standby")
