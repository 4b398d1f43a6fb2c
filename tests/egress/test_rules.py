"""Egress rules: what is refused when they are set, and that the engine decides as the readable reference does."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hypeman._native.egress import decide_access
from hypeman.egress.rules import (
    AccessRequest,
    canonical_path,
    check_access,
    compile_access,
    decide,
    may_resolve,
    openings,
)
from hypeman.egress.types import AccessAction, AccessDefault, AccessRecord, AccessRule, EgressAccess
from hypeman.errors import InvalidRequest

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
ALLOW, DENY, ASK = AccessAction.ALLOW, AccessAction.DENY, AccessAction.ASK
CLOSED = AccessDefault.DENY


def access(*rules: AccessRule, default: AccessDefault = CLOSED) -> EgressAccess:
    return check_access(EgressAccess(rules=rules, default=default))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (AccessRule(action=ALLOW, hosts=()), "empty list"),
        (AccessRule(action=ALLOW, ports=()), "empty list"),
        (AccessRule(action=ALLOW, hosts=("*",)), "name such as"),
        (AccessRule(action=ALLOW, hosts=("**.com",)), "top-level"),
        (AccessRule(action=ALLOW, hosts=("a.*.com",)), "name such as"),
        (AccessRule(action=ALLOW, hosts=("127.1",)), "is an address"),
        (AccessRule(action=ALLOW, hosts=("https://a.b",)), "name such as"),
        (AccessRule(action=ALLOW, methods=("CONNECT",)), "method"),
        (AccessRule(action=ALLOW, methods=("a b",)), "method"),
        (AccessRule(action=ALLOW, paths=("v1",)), "begin with /"),
        (AccessRule(action=ALLOW, paths=("/a?b",)), "begin with /"),
        (AccessRule(action=ALLOW, paths=("/a/../b",)), "is ambiguous"),
        (AccessRule(action=ALLOW, paths=("/a%2fb",)), "is ambiguous"),
        (AccessRule(action=ALLOW, paths=("/a*b/c",)), "whole segment"),
        (AccessRule(action=ALLOW, protocol="udp"), "protocol"),
        (AccessRule(action=ALLOW, networks=("10.0.0.0/8",)), "need at least one network, and ports"),
        (AccessRule(action=ALLOW, networks=("10.0.0.1/8",), ports=(22,)), "must be an IPv4"),
        (AccessRule(action=ALLOW, networks=("fd00::/8",), ports=(22,)), "no IPv6"),
        (AccessRule(action=ALLOW, networks=("10.0.0.0/8",), ports=(443,)), "belongs to the proxy"),
        (AccessRule(action=ALLOW, networks=("10.0.0.0/8",), ports=(443,), protocol="udp"), "belongs to the proxy"),
        (AccessRule(action=DENY, networks=("10.0.0.0/8",), ports=(22,)), "only allow"),
        (AccessRule(action=ALLOW, networks=("10.0.0.0/8",), ports=(22,), hosts=("a.b",)), "combined"),
    ],
)
def test_refused_when_set(rule: AccessRule, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        access(rule)


def test_refused_together() -> None:
    named = AccessRule(action=ALLOW, name="x", hosts=("a.b",))
    with pytest.raises(InvalidRequest, match="another rule is named"):
        access(named, named)
    raw = AccessRule(action=ALLOW, networks=("10.0.0.0/8",), ports=(22, 23, 24))
    with pytest.raises(InvalidRequest, match="overlap"):
        access(raw, AccessRule(action=ALLOW, networks=("10.1.0.0/16",), ports=(23,)))
    with pytest.raises(InvalidRequest, match="at most"):
        access(*[AccessRule(action=ALLOW)] * 1001)
    assert [(opening.first, opening.last) for opening in openings(access(raw))] == [(22, 24)]


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a/b?c=/../d", "/a/b"), ("", "/"), ("?q", "/"), ("*", "*"), ("/%61%2Db%c3%a9", "/a-b%C3%A9"), ("/a/", "/a/"),
        ("/a;x/b", "/a;x/b"), ("/a/./b", None), ("/a/../b", None), ("/..", None), ("/a//b", None), ("/a/..;x/b", None),
        ("/a/..%3bx/b", None), ("/.%3B", None), ("/a/..%3", None), ("/...%3b", "/...%3B"),
        ("/%2e%2e/b", None), ("/a%2Fb", None), ("/a%5cb", None), ("/a\\b", None), ("/a%252e", None), ("/a%00", None),
        ("/a%zz", None), ("/a%4", None), ("/...", "/..."), ("/a%20b", "/a%20b"),
    ],
)  # fmt: skip
def test_paths_have_one_spelling(target: str, path: str | None) -> None:
    assert canonical_path(target) == path
    shut = access(AccessRule(action=DENY, paths=("/unlike",)), default=AccessDefault.ALLOW)
    asked = AccessRequest(host="a.org", port=443, target=target)
    assert (in_the_engine(shut, asked)[0] == "ok") == (path is not None)


def test_names_are_looked_up_only_if_some_request_could_be_allowed() -> None:
    rules = access(
        AccessRule(action=DENY, hosts=("bad.x.org",)),
        AccessRule(action=DENY, hosts=("half.x.org",), methods=("POST",)),
        AccessRule(action=ASK, hosts=("ask.org",), ports=(8443,)),
        AccessRule(action=ALLOW, hosts=("old.org",), until=NOW),
        AccessRule(action=ALLOW, hosts=("**.x.org",), paths=("/v1/*",)),
        AccessRule(action=ALLOW, networks=("8.8.8.8/32",), ports=(53,), protocol="udp"),
    )
    names = ("bad.x.org", "half.x.org", "a.b.x.org", "x.org", "ask.org", "old.org", "other.org")
    assert [name for name in names if may_resolve(rules, name, NOW)] == ["half.x.org", "a.b.x.org", "ask.org"]
    assert may_resolve(access(*rules.rules, default=AccessDefault.ALLOW), "other.org", NOW)


hosts = st.sampled_from(
    ["a.org", "b.a.org", "c.b.a.org", "org.a", "xa.org", "127.0.0.1", "10.1.2.3", "a.org.evil.net", "2001:db8::1"]
)
patterns = st.sampled_from(
    ["a.org", "*.a.org", "**.a.org", "*.b.a.org", "b.a.org", "127.0.0.1", "evil.net", "2001:DB8:0::1", "A.org."]
)
methods = st.sampled_from(["GET", "POST", "delete", "PROPFIND"])
paths = st.sampled_from(["/", "/v1/*", "/v1", "/repos/*/issues", "/%61*", "/a/b*", "/x%2Cy"])
ports = st.sampled_from([80, 443, 8443])
targets = st.one_of(
    st.sampled_from(["/", "/v1", "/v1/", "/v1/x/y?z", "/v1/../x", "/repos/a/issues", "/repos//issues", "/abc", "/a/bc",
                     "/%61bc", "/v1/%2e%2e/x", "*", "?q", "/x,y", "/x%2cy", "/V1;a", "/repos;b/x%3bc/ISSUES/",
                     "/;a/v1"]),
    st.text("/.%abB23eF;\\*?", max_size=12).map(lambda text: "/" + text),
)  # fmt: skip


def some(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.one_of(st.none(), st.lists(values, min_size=1, max_size=3).map(tuple))


rules = st.builds(
    AccessRule,
    action=st.sampled_from(AccessAction),
    hosts=some(patterns),
    ports=some(ports),
    methods=some(methods),
    paths=some(paths),
    until=st.sampled_from([None, None, None, NOW, NOW + timedelta(seconds=1)]),
    record=st.sampled_from(AccessRecord),
)  # fmt: skip
requests = st.builds(
    AccessRequest,
    host=hosts,
    port=ports,
    method=methods,
    target=targets,
    override=st.sampled_from([False, False, True]),
)


def in_the_engine(rules: EgressAccess, request: AccessRequest) -> tuple[str, str]:
    return decide_access(
        compile_access(rules)[2:],
        request.host.encode(),
        request.port,
        request.method.encode(),
        request.target.encode(),
        request.override,
        int(NOW.timestamp()),
    )


@settings(max_examples=600, deadline=None)
@given(
    st.lists(rules, min_size=1, max_size=8), st.sampled_from(AccessDefault), st.lists(requests, min_size=1, max_size=6)
)
@example(
    [AccessRule(action=DENY, methods=("DELETE",))],
    AccessDefault.ALLOW,
    [AccessRequest(host="a.org", port=443, method="POST", override=True)],
)
def test_engine_and_reference_agree(
    given: list[AccessRule], default: AccessDefault, asked: list[AccessRequest]
) -> None:
    checked = access(*given, default=default)
    for request in asked:
        decision = decide(checked, request, NOW)
        reason = {"approval_needed": "approval_pending"}.get(decision.reason, decision.reason)
        assert in_the_engine(checked, request) == (reason, decision.rule)


@pytest.mark.parametrize(
    ("target", "denied", "allowed"),
    [
        ("/admin", True, True), ("/admin?x=1", True, True), ("/%61dmin", True, True),
        ("/admin;x", True, False), ("/admin;x=1/", True, False), ("/admin%3Bx", True, False),
        ("/admin%3bx", True, False),
        ("/;x/admin", True, False), ("/ADMIN", True, False), ("/Admin/", True, False), ("/admin/", True, False),
        ("/admin/x", False, False), ("/administrators", False, False), ("/admin.json", False, False),
        ("/sub/a;b/x", True, False), ("/SUB/", True, False),
    ],
)  # fmt: skip
def test_every_reading_of_a_path_is_denied_and_one_is_allowed(target: str, denied: bool, allowed: bool) -> None:
    """A rule that denies is no weaker than the most tolerant server; one that allows is no wider than it says."""
    asked = AccessRequest(host="a.org", port=443, target=target)
    for action in (DENY, ASK):
        shut = access(AccessRule(action=action, paths=("/admin", "/sub/*")), default=AccessDefault.ALLOW)
        assert (in_the_engine(shut, asked)[0] != "ok", decide(shut, asked, NOW).reason != "ok") == (denied, denied)
    opened = access(AccessRule(action=ALLOW, paths=("/admin",)))
    assert {in_the_engine(opened, asked)[0], decide(opened, asked, NOW).reason} == {"ok" if allowed else "no_rule"}


def test_a_thousand_rules() -> None:
    """Each is found, by exact name, by parent domain, and none by a name that is not covered."""
    many = [
        AccessRule(action=ALLOW, hosts=(f"h{n}.example.org" if n % 2 else f"**.d{n}.example.org",)) for n in range(999)
    ]
    checked = access(*many, AccessRule(action=ASK, hosts=("*.example.org",)))
    assert in_the_engine(checked, AccessRequest(host="h997.example.org", port=443)) == ("ok", "#998")
    assert in_the_engine(checked, AccessRequest(host="x.y.d998.example.org", port=443)) == ("ok", "#999")
    assert in_the_engine(checked, AccessRequest(host="h2.example.org", port=443)) == ("approval_pending", "#1000")
    assert in_the_engine(checked, AccessRequest(host="example.org", port=443)) == ("no_rule", "default")


@given(st.lists(rules, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_rules_are_refused_or_harmless(given: list[AccessRule], data: st.DataObject) -> None:
    whole = compile_access(access(*given))[2:]
    for length in range(0, len(whole), 7):
        with pytest.raises(ValueError):
            decide_access(whole[:length] or b"\xff", b"a.org", 443, b"GET", b"/", False, 0)
    broken = bytearray(whole)
    broken[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ValueError):
        decide_access(bytes(broken), b"a.org", 443, b"GET", b"/", False, 0)
