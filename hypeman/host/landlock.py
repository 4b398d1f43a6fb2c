"""Version of Landlock in the kernel, a sandbox that a program applies to itself."""

from __future__ import annotations

import ctypes

_CREATE_RULESET = 444
_ASK_VERSION = 1

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The version of the kernel's interface; 0 if it is missing or disabled."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)))
