"""Finds the original failure among several tasks that failed together."""

from __future__ import annotations

from collections.abc import Iterator

import trio


def first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception that is not a cancellation (a consequence); a cancellation only if all are."""
    leaves = list(_leaves(group))
    return next((leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
