"""Resource usage of a process, from proc(5)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(msgspec.Struct, frozen=True):
    cpu_seconds: float = 0.0
    """User and system time of the process and its threads."""
    rss_bytes: int = 0
    vms_bytes: int = 0
    started: float = 0.0
    """Seconds from the boot of the host to the start of the process, in hundredths."""


def read_usage(pid: int) -> Usage:
    """Resource usage of process ``pid`` so far; all 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return Usage()
    fields = text[text.rindex(b")") + 2 :].split()  # from field 3 on: the name before may hold spaces
    return Usage(
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS,
        rss_bytes=int(fields[21]) * _PAGE,
        vms_bytes=int(fields[20]),
        started=int(fields[19]) / _TICKS,
    )


def read_pss(pid: int) -> int | None:
    """Bytes that process ``pid`` has for itself, and its share of what it shares (PSS); None if there is none.

    Takes 1 ms for a VMM: the kernel walks its page tables.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:")), None)
    except OSError:
        return None
