"""Rates become queues."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.network.shaping import token_bucket


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
