"""``hypeman egress``: what it asks and prints."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from hypeman.egress.types import EgressRecord, InjectAs, InjectRule

RECORD = EgressRecord(
    time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), kind="request", host="api.example.com", port=443,
    method="GET", status=200, reason="ok", injected=True, credentials=("API_KEY",), bytes_up=100, bytes_down=2048,
    ms=3.5, http=2,
)  # fmt: skip


@pytest.fixture
def web(server: Any) -> None:
    server.world.instances.add("plain")
    server.world.egress.allow(
        server.world.instances.add("web"),
        InjectRule(hosts=("a.example.com", "*.b.org"), as_=InjectAs(header="Authorization", format="Bearer ${value}")),
        InjectRule(as_=InjectAs(header="X-Key", format="${value}")),
    )
    denied = msgspec.structs.replace(
        RECORD, host="10.0.0.1", port=80, status=403, reason="address_denied", injected=False, credentials=()
    )
    server.world.egress.records["web"] = [RECORD, denied]


@pytest.mark.usefixtures("web")
def test_policy(cli: Any) -> None:
    head, columns, named, every = cli("egress", "policy", "web").stdout.splitlines()
    assert head == "web: enforcement all"
    assert columns.split() == ["CREDENTIAL", "VALUE", "OF", "HOSTS", "HEADER", "FORMAT"]
    assert named.split()[:4] == ["API_KEY", "REAL_KEY", "a.example.com,", "*.b.org"]
    assert named.endswith("  Authorization  Bearer ${value}")
    assert every.split() == ["API_KEY", "REAL_KEY", "every", "X-Key", "${value}"]
    assert json.loads(cli("--format", "json", "egress", "policy", "web").stdout)["mode"] == "all"
    missing = cli("egress", "policy", "plain")
    assert (missing.exit_code, "404 no_egress_policy" in missing.stderr) == (1, True)


@pytest.mark.usefixtures("web")
def test_requests(cli: Any) -> None:
    allowed, denied = (line.split() for line in cli("egress", "requests", "web").stdout.splitlines())
    assert allowed[1:] == ["GET", "api.example.com", "200", "API_KEY", "↑100B", "↓2KB", "3.5ms"]
    assert denied[1:] == ["GET", "10.0.0.1:80", "403", "address_denied", "-", "↑100B", "↓2KB", "3.5ms"]
    [last] = cli("--format", "jsonl", "egress", "requests", "--tail", "1", "web").stdout.splitlines()
    assert json.loads(last)["reason"] == "address_denied"


@pytest.mark.usefixtures("web")
def test_requests_as_they_end(cli: Any, server: Any) -> None:
    def end() -> None:
        server.world.egress.new.send_nowait(msgspec.structs.replace(RECORD, kind="refused", method="", status=0))
        server.world.egress.new.close()

    server.do(end)
    done = cli("egress", "requests", "-f", "--tail", "0", "web")
    assert done.exit_code == 0
    assert done.stdout.split()[1:4] == ["refused", "api.example.com", "-"]


@pytest.mark.usefixtures("web")
def test_what_a_guest_chose_can_not_steer_the_terminal(cli: Any, server: Any) -> None:
    server.world.egress.records["web"] = [msgspec.structs.replace(RECORD, method="\x1b[2J")]
    assert "\x1b" not in cli("egress", "requests", "web").stdout


def test_ca(cli: Any) -> None:
    assert cli("egress", "ca").stdout == "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
