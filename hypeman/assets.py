"""Non-Python files shipped with the program: the guest kernel and its initrd.

In the appliance they are next to the package; in a checkout ``make`` puts them into ``build/guest``.
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
