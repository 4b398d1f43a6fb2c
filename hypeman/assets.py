"""Non-Python files shipped with the program: the guest kernel, its initrd, and the web UI.

In the appliance they are next to the package; in a checkout ``make`` puts them into ``build``.
"""

from __future__ import annotations

from pathlib import Path

from hypeman import architecture

_PACKAGE = Path(__file__).parent
FOLDERS = (_PACKAGE / "assets", _PACKAGE.parent / "build" / "guest")

KERNEL = architecture.HOST.kernel_file
INITRD = "initrd.cpio"


def find(name: str) -> Path | None:
    """The shipped file ``name``, or None."""
    return next((folder / name for folder in FOLDERS if (folder / name).is_file()), None)


def find_ui() -> Path | None:
    """The folder of the built web UI, or None."""
    folders = (_PACKAGE / "assets" / "ui", _PACKAGE.parent / "build" / "ui" / "dist")
    return next((folder for folder in folders if (folder / "index.html").is_file()), None)
