"""What requests to the kubelet's API ask for, and what permission they need."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from hypeman.errors import InvalidRequest, NotFound, NotSupported
from hypeman.kube.kubelet.routes import (
    MAX_PORTS,
    Attach,
    Call,
    Container,
    Exec,
    Forward,
    Health,
    ListPods,
    Logs,
    Permission,
    ResourceMetrics,
    Summary,
    parse_call,
    permission_for,
)

C = Container("ns", "pod", "main")


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("/healthz", Health()),
        ("/pods", ListPods()),
        ("/runningpods/", ListPods()),
        ("/stats/summary?only_cpu_and_memory=true", Summary()),
        ("/metrics/resource", ResourceMetrics()),
        ("/containerLogs/ns/pod/main", Logs(container=C)),
        (
            "/containerLogs/ns/pod/main?follow=true&tailLines=5&limitBytes=10&previous=true&sinceSeconds=60",
            Logs(container=C, follow=True, tail=5, limit=10, previous=True, since=60),
        ),
        ("/containerLogs/ns/pod/main?tail=all&timestamps=true", Logs(container=C, timestamps=True)),
        (
            "/containerLogs/ns/pod/main?sinceTime=2026-01-02T03:04:05Z",
            Logs(container=C, since_time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ),
        (
            "/exec/ns/pod/main?command=sh&command=-c&command=echo%20%22a%20b%22&input=1&output=1&error=1&tty=1",
            Exec(container=C, command=("sh", "-c", 'echo "a b"'), stdin=True, tty=True),
        ),
        ("/exec/ns/pod/u1/main?command=ls", Exec(
            container=Container("ns", "pod", "main", "u1"), command=("ls",), stdin=False, tty=False)),
        ("/attach/ns/pod/main?output=1", Attach(C)),
        ("/portForward/ns/pod", Forward(Container("ns", "pod"), ())),
        ("/portForward/ns/pod/u1?port=80&port=443", Forward(Container("ns", "pod", uid="u1"), (80, 443))),
    ],
)  # fmt: skip
def test_calls(target: str, call: Call) -> None:
    path, _, query = target.partition("?")
    assert parse_call(path, query.encode()) == call


@pytest.mark.parametrize(
    ("target", "error", "named"),
    [
        ("/", NotFound, "/"),
        ("/run/ns/pod/main", NotFound, "/run"),
        ("/containerLogs/ns/pod", NotFound, "/containerLogs"),
        ("/containerLogs/ns/pod/main?stream=Stderr", NotSupported, "stream"),
        ("/containerLogs/ns/pod/main?tailLines=-1", InvalidRequest, "tailLines"),
        ("/containerLogs/ns/pod/main?limitBytes=1e9", InvalidRequest, "limitBytes"),
        ("/containerLogs/ns/pod/main?sinceTime=yesterday", InvalidRequest, "sinceTime"),
        ("/containerLogs/ns/pod/main?sinceTime=2026-01-01T00:00:00", InvalidRequest, "sinceTime"),
        ("/exec/ns/pod/main", InvalidRequest, "command"),
        ("/attach/ns/pod/main?input=1", NotSupported, "stdin"),
        ("/portForward/ns/pod?port=0", InvalidRequest, "port"),
        ("/portForward/ns/pod?port=65536", InvalidRequest, "port"),
        ("/portForward/ns/pod?port=%D9%A3", InvalidRequest, "port"),
        (f"/portForward/ns/pod?port=1{',1' * MAX_PORTS}", InvalidRequest, "port"),
    ],
)
def test_what_cannot_be_is_refused_by_name(target: str, error: type[Exception], named: str) -> None:
    path, _, query = target.partition("?")
    with pytest.raises(error, match=named):
        parse_call(path, query.encode())


@pytest.mark.parametrize(
    ("method", "path", "permission"),
    [
        ("GET", "/healthz", Permission("get", ("healthz", "proxy"))),
        ("GET", "/pods", Permission("get", ("pods", "proxy"))),
        ("GET", "/stats/summary", Permission("get", ("stats",))),
        ("GET", "/metrics/resource", Permission("get", ("metrics",))),
        ("GET", "/containerLogs/ns/pod/main", Permission("get", ("proxy",))),
        ("POST", "/exec/ns/pod/main", Permission("create", ("proxy",))),
        ("GET", "/exec/ns/pod/main", Permission("create", ("proxy",))),  # a WebSocket
        ("GET", "/%65xec/ns/pod/main", Permission("create", ("proxy",))),
        ("GET", "/attach/ns/pod/main", Permission("create", ("proxy",))),
        ("GET", "//portForward/ns/pod", Permission("create", ("proxy",))),
        ("BREW", "/exec/ns/pod/main", Permission("", ("proxy",))),
        ("GET", "/statsx", Permission("get", ("proxy",))),
        ("BREW", "/pods", Permission("", ("pods", "proxy"))),
    ],
)
def test_permissions(method: str, path: str, permission: Permission) -> None:
    assert permission_for(method, path) == permission
