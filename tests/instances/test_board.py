"""The board against what it stands for: the records, rendered and encoded anew."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.ids import SERVICE_TAG, STACK_TAG
from hypeman.instances import board as board_module
from hypeman.instances.adapters import of_stack
from hypeman.instances.board import Board
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.model.types import Instance, InstanceState
from hypeman.instances.model.view import render_instance

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
STATES = (InstanceState.STOPPED, InstanceState.RUNNING)


def a_record(name: str, state: InstanceState, tag: str, seconds: int) -> InstanceRecord:
    spec = InstanceSpec(
        image="localhost/x:y", platform="linux/amd64", hypervisor=HypervisorKind.QEMU, vcpus=1, memory_bytes=1 << 30,
        hotplug_bytes=0, overlay_bytes=1 << 30, tags={"t": tag},
    )  # fmt: skip
    phases = Phases(state.value.lower(), BEGIN + timedelta(seconds=seconds), {"created": 12})
    return InstanceRecord(
        id=f"id-{name}", name=name, number=1, spec=spec, digest="sha256:0", created_at=BEGIN, state=state, phases=phases
    )


def test_services_of_one_stack_find_each_other() -> None:
    board = Board(render)
    for name, stack, service in (
        ("shop-web", "shop", "web"), ("shop-my-db", "shop", "my_db"), ("trial-my-db", "trial", "my_db"),
        ("shop-other", "", ""), ("lone", "", ""),
    ):  # fmt: skip
        made = a_record(name, InstanceState.RUNNING, "", 0)
        tags = {STACK_TAG: stack, SERVICE_TAG: service} if stack else {}
        board.post(msgspec.structs.replace(made, spec=msgspec.structs.replace(made.spec, tags=tags)))
    assert of_stack(board, "id-shop-web", "my_db") == "id-shop-my-db"
    assert of_stack(board, "id-trial-my-db", "my_db") == "id-trial-my-db"
    for asker, service in (("id-trial-my-db", "web"), ("id-shop-web", "other"), ("id-lone", "my_db"), ("gone", "web")):
        assert of_stack(board, asker, service) is None


def render(record: InstanceRecord, now: datetime) -> Instance:
    return render_instance(record, None, mdev_uuid="", now=now)


_changes = st.lists(
    st.tuples(
        st.sampled_from("abcd"), st.sampled_from((*STATES, None)), st.sampled_from("xy"), st.integers(-5, 100_000)
    ),
    max_size=20,
)


@given(_changes, st.integers(0, 200_000))
def test_lists_are_what_the_records_say(changes: list[tuple[str, Any, str, int]], seconds: int) -> None:
    """After any changes, also when the clock went back behind some of them; None removes."""
    now = BEGIN + timedelta(seconds=seconds)
    board = Board(render)
    records: dict[str, InstanceRecord] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board_module, "_now_ms", lambda: int(now.timestamp() * 1000))
        for name, state, tag, since in changes:
            if state is not None:
                records[name] = a_record(name, state, tag, since)
                board.post(records[name])
            elif name in records:
                board.remove(records.pop(name))
            for wanted in (None, *STATES):
                for tags in ({}, {"t": "x"}):
                    expected = [
                        msgspec.to_builtins(render(record, now))
                        for record in records.values()
                        if wanted in (None, record.state) and tags.items() <= record.spec.tags.items()
                    ]
                    assert json.loads(board.encoded_list(wanted, tags)) == expected
            for record in records.values():
                assert json.loads(board.encoded(record.name)) == msgspec.to_builtins(render(record, now))


def test_what_is_shown_beside_the_record_is_encoded_again() -> None:
    """``refresh``: before the next list, and before the next look at that instance alone."""
    size = "1GB"

    def shown(record: InstanceRecord, now: datetime) -> Instance:
        return msgspec.structs.replace(render(record, now), size=size)

    board = Board(shown)
    for name in "ab":
        board.post(a_record(name, InstanceState.RUNNING, "x", 0))
    size = "2GB"
    assert b'"size":"1GB"' in board.encoded("a")
    board.refresh("id-a")
    board.refresh("id-b")
    assert b'"size":"2GB"' in board.encoded("a")
    assert board.encoded_list(None, {}).count(b'"size":"2GB"') == 2
