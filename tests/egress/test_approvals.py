"""Approvals: one for requests that are alike, decisions for a time, and what is forgotten; learning and checking."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import trio
import trio.testing

from hypeman.egress import approvals as approvals_module
from hypeman.egress.approvals import Approvals
from hypeman.egress.learning import MAX_METHODS, MAX_PATHS, MAX_PLACES, Seen
from hypeman.egress.protocol import ApprovalNeeded
from hypeman.egress.records import AuditRecord
from hypeman.egress.rules import check_access, check_url
from hypeman.egress.types import AccessAction, AccessDefault, AccessRule, EgressAccess, EgressApproval
from hypeman.errors import InternalError, InvalidRequest, NotFound

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def held(path: str = "/a", *, instance: str = "one", host: str = "a.org", method: str = "POST") -> ApprovalNeeded:
    return ApprovalNeeded(
        token=1, loop=0, instance=instance, tls=True, host=host, port=443, method=method, path=path, rule="writes"
    )


class Approver(Approvals):
    """Keeps what was logged and decided."""

    def __init__(self) -> None:
        super().__init__(self.note, timeout=60)
        self.events: list[tuple[str, str]] = []
        self.decided: list[tuple[str, bool]] = []
        self.broken = False

    async def note(self, action: str, shown: EgressApproval) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise InternalError("the store is full")
        self.events.append((action, shown.path))

    async def request(self, request: ApprovalNeeded) -> None:
        async def decide(allow: bool) -> None:
            await trio.lowlevel.checkpoint()
            self.decided.append((request.path, allow))

        await self.ask(request, decide)


async def test_those_of_all_instances(autojump_clock: trio.testing.MockClock) -> None:
    approver = Approver()
    for instance in ("one", "two"):
        await approver.request(held(instance=instance))
    assert [each.instance_id for each in approver.pending()] == ["one", "two"]
    await trio.sleep(61)
    assert approver.pending() == []


async def test_one_approval_for_requests_that_are_alike(autojump_clock: trio.testing.MockClock) -> None:
    approver = Approver()
    for path in ("/a", "/a", "/b"):
        await approver.request(held(path))
    first, second = approver.pending("one")
    assert [(each.path, each.waiting) for each in (first, second)] == [("/a", 2), ("/b", 1)]
    assert approver.pending("two") == []
    with pytest.raises(NotFound):
        await approver.decide("two", first.id, allow=True, seconds=0)
    await approver.decide("one", first.id, allow=True, seconds=0)
    assert approver.decided == [("/a", True)] * 2
    assert approver.events == [("approval_requested", "/a"), ("approval_requested", "/b"), ("approved", "/a")]
    with pytest.raises(NotFound):
        await approver.decide("one", first.id, allow=True, seconds=0)
    await approver.request(held("/a"))
    assert len(approver.decided) == 2, "only those that waited"
    await trio.sleep(61)
    assert approver.pending("one") == []


async def test_a_decision_for_a_time(autojump_clock: trio.testing.MockClock) -> None:
    """Covers what the rule asks about at that host, until its time is over or the rules change."""
    approver = Approver()
    for path in ("/a", "/b"):
        await approver.request(held(path))
    await approver.decide("one", approver.pending("one")[0].id, allow=False, seconds=600)
    assert approver.decided == [("/a", False), ("/b", False)]
    await approver.request(held("/c"))
    assert approver.decided[2:] == [("/c", False)]
    for other in (held("/d", host="b.org"), held("/d", instance="two")):
        await approver.request(other)
    assert len(approver.decided) == 3
    approver.forget("one")
    await approver.request(held("/e"))
    assert [each.path for each in approver.pending("one")] == ["/d", "/e"]
    await approver.decide("one", approver.pending("one")[1].id, allow=True, seconds=600)
    await trio.sleep(601)
    await approver.request(held("/f"))
    assert [each.path for each in approver.pending("one")] == ["/f"]


async def test_bounds_and_a_store_that_fails(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals_module, "MAX_PENDING", 2)
    monkeypatch.setattr(approvals_module, "MAX_DECIDED", 2)
    approver = Approver()
    approver.broken = True
    for path in ("/a", "/b", "/c"):
        await approver.request(held(path))
    assert [each.path for each in approver.pending("one")] == ["/a", "/b"]
    for each in approver.pending("one"):
        await approver.decide("one", each.id, allow=True, seconds=0)
    assert approver.decided == [("/a", True), ("/b", True)]
    for host in ("a.org", "b.org", "c.org"):
        await approver.request(held(host=host))
        await approver.decide("one", approver.pending("one")[0].id, allow=True, seconds=60)
    assert {scope.host for scope in approver._decided} == {"b.org", "c.org"}


async def test_requests_given_up_and_repeated_are_not_kept_without_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    approver = Approver()
    for _ in range(approvals_module.MAX_WAITING + 500):
        await approver.request(held())
    (each,) = approver.pending("one")
    assert each.waiting == approvals_module.MAX_WAITING
    await approver.decide("one", each.id, allow=True, seconds=0)
    assert len(approver.decided) == approvals_module.MAX_WAITING


def record(host: str, method: str = "GET", target: str = "", **fields: object) -> AuditRecord:
    given = {
        "time": 1.0, "instance": "one", "kind": "request", "host": host, "port": 443, "method": method, "status": 200,
        "reason": "ok", "injected": False, "credentials": (), "bytes_up": 0, "bytes_down": 0, "seconds": 0.1, "http": 1,
        "decision": "observed", "rule": "default", "target": target,
    }  # fmt: skip
    return AuditRecord(**(given | fields))  # type: ignore[arg-type]


def test_the_narrowest_rules_for_what_was_seen() -> None:
    seen = Seen()
    for each in (
        record("a.org", "GET", "/v1/x?key=1"), record("a.org", "POST", "/v1/y"), record("b.org", target="/v1/x"),
        record("b.org", "POST", "/v1/y"), record("c.org"), record("d.org", "", kind="passed_through"),
        record("e.org", kind="refused"), record("f.org", reason="connect_failed"), record("g.org", reason="no_rule"),
        record("h.org", target="/a/../b"),
    ):  # fmt: skip
        seen.add(each)
    allow = AccessAction.ALLOW
    assert seen.rules() == (
        AccessRule(
            action=allow, hosts=("a.org", "b.org"), ports=(443,), methods=("GET", "POST"), paths=("/v1/x", "/v1/y")
        ),
        AccessRule(action=allow, hosts=("c.org", "h.org"), ports=(443,), methods=("GET",)),
        AccessRule(action=allow, hosts=("d.org",), ports=(443,)),
    )
    assert seen.requests == 7
    check_access(EgressAccess(rules=seen.rules(), default=AccessDefault.DENY))


def test_what_is_remembered_is_bounded() -> None:
    seen = Seen()
    for number in range(MAX_PATHS + 1):
        seen.add(record("a.org", target=f"/{number}"))
    assert [rule.paths for rule in seen.rules()] == [None]
    for number in range(MAX_PLACES + 5):
        seen.add(record(f"h{number}.org"))
    assert (sum(len(rule.hosts or ()) for rule in seen.rules()), seen.complete) == (MAX_PLACES, False)


def test_invented_methods_are_not_remembered_without_end() -> None:
    seen = Seen()
    for number in range(MAX_METHODS):
        seen.add(record("a.org", f"M{number}"))
    (rule,) = seen.rules()
    assert rule.methods is not None and len(rule.methods) == MAX_METHODS
    for number in range(MAX_METHODS, 500):
        seen.add(record("a.org", f"M{number}"))
    assert [rule.methods for rule in seen.rules()] == [None]
    assert all(place.methods is None for place in seen._places.values())


def test_checking_a_url() -> None:
    access = check_access(
        EgressAccess(
            rules=(
                AccessRule(action=AccessAction.ALLOW, hosts=("a.org",), methods=("GET",)),
                AccessRule(action=AccessAction.ASK, hosts=("a.org",), ports=(443, 8443)),
            ),
            default=AccessDefault.DENY,
        )
    )

    def said(url: str, method: str = "GET") -> tuple[str, str, str, bool]:
        found = check_url(access, url, method, NOW, web_only=True)
        return found.decision.value, found.rule, found.reason, found.resolves

    assert said("https://A.org./v1?x#y") == ("allow", "#1", "ok", True)
    assert said("https://a.org/", "post") == ("ask", "#2", "approval_needed", True)
    assert said("http://a.org/", "POST") == ("deny", "default", "no_rule", True)
    assert said("https://b.org") == ("deny", "default", "no_rule", False)
    assert said("https://a.org:9000/")[2] == "port_denied"
    assert check_url(None, "https://b.org:9000", "GET", NOW, web_only=False).decision is AccessAction.ALLOW
    for url in ("", "a.org", "ftp://a.org", "https://", "https://u@a.org", "https://*.a.org", "https://a.org:x"):
        with pytest.raises(InvalidRequest):
            said(url)
    with pytest.raises(InvalidRequest):
        said("https://a.org", "G T")
