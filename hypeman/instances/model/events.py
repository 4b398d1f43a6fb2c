"""What a VM reports while it is watched. Pure."""

from __future__ import annotations

from typing import TypeAlias

from hypeman.guest.types import GuestEvent
from hypeman.hypervisor.interface import VmmExit


class Unwatched:
    """The VMM may be alive, but watching it failed: it must be reattached."""


VmEvent: TypeAlias = VmmExit | Unwatched | GuestEvent
