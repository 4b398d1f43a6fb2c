"""This program as a helper process: image worker, engine.

Imports nothing, since those processes are to stay small.
"""

from __future__ import annotations

import sys


def own_command(name: str, module: str, fd: int) -> list[str]:
    """The command line of the helper ``name`` that serves the descriptor ``fd``: from source its module, in the bundle
    ``@name``, which ``hypeman/__main__.py`` knows."""
    if getattr(sys, "frozen", False):
        return [sys.executable, f"@{name}", str(fd)]
    return [sys.executable, "-m", module, str(fd)]
