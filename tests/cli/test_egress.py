"""``hypeman egress``: what it asks and prints."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
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
def test_text_of_a_guest_cannot_control_the_terminal(cli: Any, server: Any) -> None:
    server.world.egress.records["web"] = [msgspec.structs.replace(RECORD, method="\x1b[2J")]
    assert "\x1b" not in cli("egress", "requests", "web").stdout


def test_ca(cli: Any) -> None:
    assert cli("egress", "ca").stdout == "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.mark.usefixtures("web")
def test_check_and_learn(cli: Any) -> None:
    found = cli("egress", "check", "web", "https://api.example.com/v1", "-X", "POST")
    assert (found.exit_code, found.stdout) == (0, "allow: POST https://api.example.com:443 (rule default)\n")
    found = cli("egress", "check", "web", "https://api.example.com:8443/")
    assert (found.exit_code, "port_denied" in found.stdout) == (1, True)
    learnt = json.loads(cli("egress", "learn", "web").stdout)
    assert (learnt["default"], learnt["rules"][0]["hosts"]) == ("deny", ["api.example.com"])


@pytest.mark.usefixtures("web")
def test_approvals(cli: Any, server: Any) -> None:
    egress = server.world.egress
    instance = server.world.instances.find("web")
    egress.hold(instance)
    _, line = cli("egress", "pending", "web").stdout.splitlines()
    assert line.split()[:4] == ["a1", "writes", "POST", "https://api.example.com:443/v1/x"]
    _, line = cli("egress", "pending").stdout.splitlines()
    assert line.split()[:3] == ["a1", "web", "writes"]
    assert cli("egress", "approve", "web", "a1", "--for", "10m").stdout.startswith("approved: 1 ")
    egress.hold(instance)
    assert cli("egress", "deny", "web", "a1").stdout.startswith("denied: 1 ")
    assert egress.decided == [("a1", True, 600), ("a1", False, 0)]
    missing = cli("egress", "deny", "web", "a1")
    assert (missing.exit_code, "404 no_approval" in missing.stderr) == (1, True)


@pytest.mark.usefixtures("web")
def test_rules_from_a_file(cli: Any, server: Any, tmp_path: Path) -> None:
    """The output of learn is a file for update and run."""
    file = tmp_path / "rules.json"
    file.write_text(cli("egress", "learn", "web").stdout)
    assert cli("update", "egress-rules", "web", str(file)).exit_code == 0
    [(_, request)] = server.world.instances.asked
    assert request.network.egress.default == "deny" and request.network.egress.rules[0].methods == ("GET",)
    for wrong in ("", "[]", "{"):
        file.write_text(wrong)
        assert cli("update", "egress-rules", "web", str(file)).exit_code == 2
    file.write_text('{"rules": [{"action": "allow", "host": "a.org"}]}')
    refused = cli("update", "egress-rules", "web", str(file))
    assert (refused.exit_code, "host" in refused.stderr) == (1, True)
