"""What the node reports of its host."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from hypeman.kube.capacity import conditions
from hypeman.resources.types import Resources, ResourceStatus


@pytest.mark.parametrize(("free", "pressure"), [(240, "False"), (50, "False"), (49, "True"), (0, "True")])
def test_a_disk_of_which_much_is_promised_is_not_full(free: int, pressure: str) -> None:
    """Oversubscription multiplies the limit, not the disk."""

    def of(kind: str) -> ResourceStatus:
        return ResourceStatus(
            type=kind, capacity=1000, effective_limit=64_000, allocated=0, available=free, oversub_ratio=64.0
        )

    resources = Resources(cpu=of("cpu"), memory=of("memory"), disk=of("disk"), network=of("network"), allocations=())
    found = {each.type: each.status for each in conditions(resources, (), datetime.now(UTC))}
    assert found["DiskPressure"] == pressure
