"""The log of life-cycle changes. See README.md."""

from hypeman.events.log import record
from hypeman.events.types import Event, Kind

__all__ = ["Event", "Kind", "record"]
