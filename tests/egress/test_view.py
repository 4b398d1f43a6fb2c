"""What operators see of the egress path: lines, metrics, the stored policy and requests as they end.

The data plane is the real one, on loopback, with a guest at 127.0.1.1 whose every request is denied.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hypeman._native.egress import METRICS
from hypeman.egress import audit as audit_module
from hypeman.egress import metrics as egress_metrics
from hypeman.egress import usage as usage_module
from hypeman.egress import view as view_module
from hypeman.egress.approvals import Approvals
from hypeman.egress.audit import AuditLog
from hypeman.egress.metrics import FAMILIES, LEFT_OUT
from hypeman.egress.records import AuditRecord
from hypeman.egress.rules import check_access
from hypeman.egress.service import Egress, Settings
from hypeman.egress.types import (
    AccessAction,
    AccessDefault,
    AccessRule,
    CredentialPolicy,
    CredentialSource,
    EgressAccess,
    EgressApproval,
    EgressEnforcementMode,
    InjectAs,
    InjectRule,
)
from hypeman.egress.usage import Usage
from hypeman.egress.view import EgressRecords, EgressView
from hypeman.errors import NotFound
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.adapters import EgressGuests, NamesOfInstances
from hypeman.instances.board import Board
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.model.types import Instance, InstanceState
from hypeman.telemetry import metrics
from hypeman.telemetry.logs import setup_logs

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GUEST = "127.0.1.1"
CREDENTIAL = CredentialPolicy(
    source=CredentialSource(env="REAL_KEY"),
    inject=(InjectRule(hosts=("api.example.com",), as_=InjectAs(header="Authorization", format="Bearer ${value}")),),
)


def audited(number: int, instance: str = "one") -> AuditRecord:
    return AuditRecord(
        time=1767323045.5, instance=instance, kind="request", host="api.example.com", port=443, method="GET",
        status=200 + number, reason="ok", injected=True, credentials=("API_KEY",), bytes_up=10, bytes_down=20,
        seconds=0.0123456, http=1,
    )  # fmt: skip


def instance(name: str, mode: EgressEnforcementMode | None = EgressEnforcementMode.ALL) -> InstanceRecord:
    spec = InstanceSpec(
        image="alpine", platform="linux/amd64", hypervisor=HypervisorKind.QEMU, vcpus=1, memory_bytes=2**30,
        hotplug_bytes=0, overlay_bytes=2**30, credentials={"API_KEY": CREDENTIAL} if mode else {}, egress=mode,
    )  # fmt: skip
    return InstanceRecord(
        id=name, name=f"name-of-{name}", number=1, spec=spec, digest="sha256:0", state=InstanceState.RUNNING,
        created_at=NOW, phases=Phases("running", NOW),
    )  # fmt: skip


def render(record: InstanceRecord, now: datetime) -> Instance:
    return Instance(id=record.id, name=record.name, image="alpine", state=record.state, created_at=NOW)


def test_names_follow_the_rules_of_their_instance(tmp_path: Path) -> None:
    """A refused look-up is recorded; an instance without rules looks up what it likes."""
    board = Board(render)
    rules = check_access(
        EgressAccess(rules=(AccessRule(action=AccessAction.ALLOW, hosts=("*.x.org",)),), default=AccessDefault.DENY)
    )
    for record in (instance("one"), instance("two")):
        access = rules if record.id == "one" else None
        board.post(msgspec.structs.replace(record, spec=msgspec.structs.replace(record.spec, access=access)))
    egress = Egress(Settings(address="127.0.0.1", port=0), tmp_path)
    records: list[AuditRecord] = []
    egress.on_audit(records.append)
    names = NamesOfInstances(egress, board)
    asked = [("one", "a.x.org"), ("one", "a.y.org"), ("one", ""), ("two", "a.y.org"), ("three", "a.x.org")]
    assert [names.may_look_up(*each) for each in asked] == [True, False, False, True, False]
    assert [(record.instance, record.host, record.decision, record.rule) for record in records] == [
        ("one", "a.y.org", "denied", "default"), ("one", "", "denied", "default"),
    ]  # fmt: skip


async def ignore(action: str, shown: EgressApproval) -> None:
    pass


@pytest.fixture
def board() -> Board:
    board = Board(render)
    for record in (instance("one"), instance("two"), instance("off", None)):
        board.post(record)
    return board


@pytest.fixture
async def egress(tmp_path: Path) -> AsyncIterator[Egress]:
    egress = Egress(Settings(address="127.0.0.1", port=0, loops=1), tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(egress.run)
        await egress.set_policy("one", GUEST, {"API_KEY": CREDENTIAL}, {"REAL_KEY": "sk-live-7f3a91"})
        await egress.accept()
        yield egress
        nursery.cancel_scope.cancel()


async def ask_denied(egress: Egress) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", egress.port, local_address=GUEST)
    async with stream:
        await stream.send_all(b"GET http://10.0.0.1/a-path?a-query HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 403 ")


# ── The log ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def lines() -> Iterator[Any]:
    """The log's lines as they are decoded, as the server writes them."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    setup_logs("info", "json", stream)
    [handler] = root.handlers

    def written() -> list[Any]:
        handler.flush()
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield written
    root.handlers[:] = handlers
    root.setLevel(level)


async def test_one_line_a_request(lines: Any, nursery: trio.Nursery) -> None:
    audit = AuditLog()
    nursery.start_soon(audit.run)
    for number in range(100):
        audit.offer(audited(number))
    with trio.fail_after(10):
        while len(lines()) < 100:
            await trio.lowlevel.checkpoint()
    line = lines()[4]
    assert line.pop("time")
    assert line == {
        "level": "info", "logger": "hypeman.egress.audit", "message": "request", "instance": "one",
        "host": "api.example.com", "port": 443, "method": "GET", "status": 204, "reason": "ok", "injected": True,
        "rules": ["API_KEY"], "bytes_up": 10, "bytes_down": 20, "ms": 12.35,
    }  # fmt: skip
    nursery.cancel_scope.cancel()


def test_too_many_lines_are_counted(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "MAX_QUEUED", 3)
    audit = AuditLog()
    for number in range(5):
        audit.offer(audited(number))
    audit.flush()
    *written, lost = lines()
    assert [line["status"] for line in written] == [200, 201, 202]
    assert (lost["level"], lost["lost"]) == ("warning", 2)
    audit.flush()
    assert len(lines()) == 4


def test_no_line_below_the_level(lines: Any) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    audit = AuditLog()
    audit.offer(audited(0))
    logging.getLogger().setLevel(logging.INFO)
    audit.flush()
    assert lines() == []


async def test_a_real_denial_is_logged_without_its_path(lines: Any, egress: Egress, nursery: trio.Nursery) -> None:
    audit = AuditLog()
    egress.on_audit(audit.offer)
    nursery.start_soon(audit.run)
    await ask_denied(egress)
    with trio.fail_after(10):
        while not (found := [line for line in lines() if line["logger"] == "hypeman.egress.audit"]):
            await trio.sleep(0.01)
    [line] = found
    record = {key: line[key] for key in ("instance", "host", "method", "status", "injected", "rules")}
    assert record == {
        "instance": "one", "host": "10.0.0.1", "method": "GET", "status": 403, "injected": False, "rules": [],
    }  # fmt: skip
    assert line["reason"] in ("address_denied", "address_literal")
    assert not any(word in json.dumps(line) for word in ("a-path", "a-query", "sk-live"))
    nursery.cancel_scope.cancel()


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────


def test_every_counter_has_its_metric() -> None:
    named = [counter for family in FAMILIES.values() for counter in family.counters]
    assert sorted([*named, *LEFT_OUT]) == sorted(METRICS)


async def test_metrics_of_a_real_denial(egress: Egress) -> None:
    egress_metrics.register(egress)
    await ask_denied(egress)
    await metrics.refresh()
    text = metrics.render_metrics().decode()
    for line in (
        "hypeman_egress_requests_total 1.0",
        "# TYPE hypeman_egress_connections gauge",
        "# TYPE hypeman_egress_accepted_total counter",
        'hypeman_egress_accepted_total{outcome="accepted"} 1.0',
        'hypeman_egress_accepted_total{outcome="unregistered"} 0.0',
    ):
        assert line in text
    denied = [line for line in text.splitlines() if line.startswith("hypeman_egress_denied_total{")]
    assert sum(float(line.rpartition(" ")[2]) for line in denied) == 1


def test_metrics_without_a_running_data_plane(tmp_path: Path) -> None:
    egress_metrics.register(Egress(Settings(address="127.0.0.1", port=0, loops=1), tmp_path))
    names = [line.partition(" ")[0] for line in metrics.render_metrics().decode().splitlines()]
    assert "hypeman_egress_requests_total" not in names
    assert "hypeman_uptime_seconds" in names


def test_usage_of_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """By instance and name; the one that was used longest ago is forgotten for another."""
    monkeypatch.setattr(usage_module, "MAX_CREDENTIALS", 2)
    usage = Usage()
    used = msgspec.structs.replace(audited(0), credentials=("KEY", "SIGNING"), injected=True, bytes_up=3, bytes_down=5)
    for status, reason in ((200, "ok"), (204, "ok"), (401, "ok"), (500, "ok"), (502, "upstream_closed")):
        usage.add(msgspec.structs.replace(used, status=status, reason=reason))
    usage.add(msgspec.structs.replace(used, credentials=()))
    assert usage.requests() == {
        ("one", key, outcome): count
        for key in ("KEY", "SIGNING")
        for outcome, count in (("ok", 2), ("rejected", 1), ("failed", 2))
    }
    assert usage.bytes()["one", "KEY", "up"] == 15 and usage.bytes()["one", "SIGNING", "down"] == 25
    usage.add(msgspec.structs.replace(used, credentials=("KEY",)))
    usage.add(msgspec.structs.replace(used, instance="two", credentials=("KEY",)))
    assert (
        {key[:2] for key in usage.requests()} == {("one", "KEY"), ("two", "KEY")} == {key[:2] for key in usage.bytes()}
    )


# ── What the API asks ────────────────────────────────────────────────────────────────────────────


async def test_policy_as_stored(egress: Egress, board: Board) -> None:
    view = EgressView(egress, EgressGuests(board), Approvals(ignore, timeout=60))
    assert view.ca_pem().startswith(b"-----BEGIN CERTIFICATE-----")
    policy = view.policy("name-of-one")
    assert (policy.instance_id, policy.mode) == ("one", EgressEnforcementMode.ALL)
    assert policy.credentials == {"API_KEY": CREDENTIAL}
    for missing in ("off", "nobody"):
        with pytest.raises(NotFound):
            view.policy(missing)


async def statuses(view: EgressView, ref: str, tail: int) -> list[int]:
    return [record.status - 200 async for record in await view.requests(ref, tail=tail, follow=False)]


async def test_the_last_requests_are_kept(egress: Egress, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MAX_RECORDS", 3)
    monkeypatch.setattr(view_module, "MAX_INSTANCES", 2)
    view = EgressView(egress, EgressGuests(board), Approvals(ignore, timeout=60))
    for number in range(5):
        view.keep(audited(number))
    assert await statuses(view, "one", 100) == [2, 3, 4]
    assert await statuses(view, "one", 2) == [3, 4]
    assert await statuses(view, "one", 0) == []
    assert await statuses(view, "two", 100) == []
    view.keep(audited(0, "two"))
    view.keep(audited(5))
    view.keep(audited(0, "three"))  # the third: who was silent longest is forgotten
    assert await statuses(view, "two", 100) == []
    assert await statuses(view, "one", 1) == [5]
    with pytest.raises(NotFound):
        await view.requests("off", tail=1, follow=True)


async def read_to_end(stream: EgressRecords) -> None:
    assert [record async for record in stream] == []


async def test_followers_see_real_requests_until_the_instance_goes(egress: Egress, board: Board) -> None:
    view = EgressView(egress, EgressGuests(board), Approvals(ignore, timeout=60))
    egress.on_audit(view.keep)
    view.keep(audited(7))
    stream = await view.requests("one", tail=1, follow=True)
    assert (await anext(stream)).status == 207
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_denied, egress)
            denied = await anext(stream)
        assert (denied.host, denied.status, denied.credentials) == ("10.0.0.1", 403, ())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_to_end, stream)
            await trio.testing.wait_all_tasks_blocked(0.01)
            board.post(msgspec.structs.replace(board.find("one"), state=InstanceState.STOPPED))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(nursery.child_tasks) == 1, "another state is not the end"
            board.remove(board.find("one"))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_follower_that_leaves_is_forgotten(egress: Egress, board: Board) -> None:
    view = EgressView(egress, EgressGuests(board), Approvals(ignore, timeout=60))
    before = len(egress._on_audit)
    stream = await view.requests("one", tail=0, follow=True)
    assert len(egress._on_audit) == before + 1
    with trio.move_on_after(0.01):
        await anext(stream)
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.aclose()
    assert len(egress._on_audit) == before
