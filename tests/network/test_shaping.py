"""Rates become queues; unset limits become shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.network.shaping import default_share, token_bucket


@given(st.integers(1, 2**32 - 1))
def test_every_rate_has_a_queue_that_can_keep_it(rate: int) -> None:
    """The burst holds a segment and what comes between two ticks of a 250 Hz timer; the queue two segments of 64 KB."""
    bucket = token_bucket(rate)
    assert bucket is not None
    assert bucket.rate == rate
    assert bucket.burst >= max(9000, rate // 250)
    assert 128 * 1024 <= bucket.queue <= 2**32 - 1


@pytest.mark.parametrize("rate", [0, 2**32, 2**40])
def test_nothing_to_limit(rate: int) -> None:
    assert token_bucket(rate) is None


@pytest.mark.parametrize(
    ("capacity", "vcpus", "host_vcpus", "share"),
    [
        (1_000_000, 2, 8, 250_000),
        (1_000_000, 16, 8, 1_000_000),
        (10, 1, 64, 1),
        (0, 2, 8, 0),
        (1_000_000, 2, 0, 0),
    ],
)
def test_default_shares(capacity: int, vcpus: int, host_vcpus: int, share: int) -> None:
    assert default_share(capacity, vcpus, host_vcpus) == share
