"""Usage over HTTP: times, filters, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from hypeman.metering.types import UsageBy
from tests.fakes.services import FakeWorld


async def test_a_report_is_asked_for(ask: Any, world: FakeWorld) -> None:
    query = "since=2026-01-01T00:00:00%2B01:00&by=tag&tag=team&instance=web&tags[env]=a"
    found = await (await ask("GET", f"/usage?{query}")).get_json()
    assert (found["by"], found["rows"][0]["cpu_seconds"]) == ("tag", 12.5)
    [asked] = world.metering.asked
    assert asked.since == datetime(2025, 12, 31, 23, tzinfo=UTC).timestamp()
    assert (asked.until, asked.by, asked.tag) == (float("inf"), UsageBy.TAG, "team")
    assert (asked.instance, asked.tags) == ("web", {"env": "a"})
    await ask("GET", "/usage?since=24h&until=1h")
    since, until = world.metering.asked[-1].since, world.metering.asked[-1].until
    assert until - since == pytest.approx(23 * 3600, abs=5)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("since=soon", "invalid_since"),
        ("until=2026-01-01T00:00:00", "invalid_until"),
        ("by=week", "Bad Request"),
        ("since=99999999999999h", "invalid_since"),
    ],
)
async def test_wrong_queries(ask: Any, query: str, code: str) -> None:
    response = await ask("GET", f"/usage?{query}")
    assert (response.status_code, (await response.get_json())["code"]) == (400, code)


async def test_verify(ask: Any) -> None:
    assert (await (await ask("GET", "/usage/verify")).get_json())["valid"]
    noted = await (await ask("GET", f"/usage/verify?block=1&hash={'bb' * 32}")).get_json()
    assert (noted["valid"], noted["block"]) == (False, 1)
    for query in ("block=1", f"hash={'bb' * 32}", "block=1&hash=xyz", "block=-1&hash="):
        assert (await ask("GET", f"/usage/verify?{query}")).status_code == 400
