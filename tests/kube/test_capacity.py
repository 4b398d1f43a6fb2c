"""What the node reports of its host."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from hypeman.kube.capacity import conditions
from hypeman.resources.types import Resources, ResourceStatus


def resources(free: int) -> Resources:
    def of(kind: str) -> ResourceStatus:
        return ResourceStatus(
            type=kind, capacity=1000, effective_limit=64_000, allocated=0, available=free, oversub_ratio=64.0
        )

    return Resources(cpu=of("cpu"), memory=of("memory"), disk=of("disk"), network=of("network"), allocations=())


@pytest.mark.parametrize(("free", "pressure"), [(240, "False"), (50, "False"), (49, "True"), (0, "True")])
def test_a_disk_of_which_much_is_promised_is_not_full(free: int, pressure: str) -> None:
    """Oversubscription multiplies the limit, not the disk."""
    found = {condition.type: condition.status for condition in conditions(resources(free), (), datetime.now(UTC))}
    assert found["DiskPressure"] == pressure


@pytest.mark.parametrize(
    ("ahead", "status", "text"),
    [
        (0.0, "False", "agrees"),
        (-29.0, "False", "agrees"),
        (3600.4, "True", "3600 s ahead of"),
        (-60.0, "True", "60 s behind"),
    ],
)
def test_a_clock_that_is_off_is_a_condition(ahead: float, status: str, text: str) -> None:
    found = {
        condition.type: condition for condition in conditions(resources(100), (), datetime.now(UTC), clock_ahead=ahead)
    }
    assert found["ClockSkewed"].status == status and text in found["ClockSkewed"].message
    assert found["Ready"].status == "True", "it works on"
