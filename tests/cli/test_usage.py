"""``hypeman usage``: tables of what was used, and the check of the ledger."""

from __future__ import annotations

import json
from typing import Any

from hypeman.metering.types import UsageBy


def test_usage(cli: Any, server: Any) -> None:
    head, web, total = cli("usage").stdout.splitlines()
    assert head.split()[:2] == ["INSTANCE", "CPU"]
    assert web.split()[:4] == ["web", "0.003", "2.000", "10.000"]
    assert total.split()[0] == "TOTAL"
    assert cli("usage", "--by-tag", "team", "--since", "24h", "--tag", "env=a").stdout.startswith("TEAM")
    asked = server.world.metering.asked[-1]
    assert (asked.by, asked.tag, asked.tags) == (UsageBy.TAG, "team", {"env": "a"})
    assert json.loads(cli("usage", "-o", "json").stdout)["by"] == "instance"
    assert cli("usage", "--since", "soon").exit_code == 1


def test_verify(cli: Any) -> None:
    assert cli("usage", "verify").stdout == f"valid: blocks 1 to 1, 3 entries\nlast block 1 {'aa' * 32}\n"
    wrong = cli("usage", "verify", "--block", "1", "--hash", "bb" * 32)
    assert (wrong.exit_code, wrong.stdout) == (1, "not valid: block 1: it is not the block that was noted\n")
