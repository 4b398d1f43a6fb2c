"""Counts everything that changes a file, in several processes, and kills them at one of these points."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

_CHANGING = ("pwrite", "write", "rename", "unlink", "rmdir", "mkdir", "fsync", "ftruncate", "chmod")


class Points:
    """``journal`` is a file with one byte for each point so far; at number ``at`` the ``victims`` die.

    The kill comes before the change; the one before the next change shows this one done.
    """

    def __init__(self, journal: str, at: int, victims: tuple[int, ...]) -> None:
        self._journal = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._at = at
        self._victims = victims
        self._write = os.write

    def reach(self) -> None:
        self._write(self._journal, b".")
        if os.fstat(self._journal).st_size == self._at:
            for victim in self._victims:
                os.kill(victim, signal.SIGKILL)
            signal.pause()

    def is_next(self) -> bool:
        """Whether the next point is the one."""
        return os.fstat(self._journal).st_size + 1 == self._at

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.reach()
            return function(*args, **kwargs)

        return wrapped

    def install(self) -> None:
        for name in _CHANGING:
            setattr(os, name, self.before(getattr(os, name)))
