"""One heap of deadlines for all instances and policies, instead of a task for each of them.

A deadline replaces the earlier one of the same key. Pure: the caller passes the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """Deadlines on any clock; keys are returned once, when theirs has passed."""

    def __init__(self) -> None:
        self._due: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._due)

    def set(self, key: K, deadline: float) -> None:
        self._number += 1
        self._due[key] = deadline, self._number
        heapq.heappush(self._heap, (deadline, self._number, key))
        if len(self._heap) > 2 * len(self._due) + 64:  # mostly replaced entries
            self._heap = [(deadline, number, key) for key, (deadline, number) in self._due.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: K) -> None:
        self._due.pop(key, None)

    def next(self) -> float | None:
        """The earliest deadline."""
        self._drop_replaced()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> Iterator[K]:
        """Keys whose deadline is ``now`` or earlier, in order; they are removed."""
        while (deadline := self.next()) is not None and deadline <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._due[key]
            yield key

    def _drop_replaced(self) -> None:
        while self._heap and self._due.get(self._heap[0][2], (0.0, -1))[1] != self._heap[0][1]:
            heapq.heappop(self._heap)
