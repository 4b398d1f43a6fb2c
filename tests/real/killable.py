"""The real server, with a bomb in it: ``python -m tests.real.killable FILE``.

It counts the moments at which a crash would hurt: before and after every commit of the store, and
before and after every effect on the world. When FILE appears, it holds the number of moments to let
pass; at the next one the process kills itself with SIGKILL. How many passed is kept in FILE.seen, so
that a test knows when it has visited all of them.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from hypeman import app
from hypeman.config import load_config
from hypeman.instances.world import World
from hypeman.store import Store


class Bomb:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = 0

    def tick(self, where: str) -> None:
        try:
            wanted = int(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return
        if self._seen == wanted:
            self._file.with_suffix(".where").write_text(where)
            os.kill(os.getpid(), signal.SIGKILL)
        self._seen += 1
        self._file.with_suffix(".seen").write_text(str(self._seen))


def arm(bomb: Bomb) -> None:
    def around(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(fn):

            @wraps(fn)
            async def wrapped(*args: Any, **kwargs: Any) -> Any:
                bomb.tick(f"before {name}")
                result = await fn(*args, **kwargs)
                bomb.tick(f"after {name}")
                return result
        else:

            @wraps(fn)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                bomb.tick(f"before {name}")
                result = fn(*args, **kwargs)
                bomb.tick(f"after {name}")
                return result

        return wrapped

    Store._commit = around("commit", Store._commit)  # type: ignore[method-assign]
    for name, method in inspect.getmembers(World, inspect.iscoroutinefunction):
        if not name.startswith("_") and name not in ("read_outcome",):
            setattr(World, name, around(name, method))


if __name__ == "__main__":
    arm(Bomb(Path(sys.argv[1])))
    app.main(load_config())
