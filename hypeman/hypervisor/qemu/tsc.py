"""Frequency of the host's time stamp counter, which is also that of a TCG guest.

Linux does not expose it, so it is measured once: the counter against the clock, over 50 ms. The difference
from the kernel's own value was below 0.001 %.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from functools import cache

import trio

_RDTSC = bytes.fromhex("0f3148c1e2204809d0c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_SECONDS = 0.05
_known: list[int] = []


async def tsc_khz() -> int:
    """kHz, measured at the first call."""
    if not _known:
        _known.append(await trio.to_thread.run_sync(_measure))
    return _known[0]


def _measure() -> int:
    read, _ = _code()
    ticks, begin = _sample(read)
    time.sleep(_SECONDS)
    more_ticks, end = _sample(read)
    return round((more_ticks - ticks) * 1e6 / (end - begin))


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """Counter and nanoseconds of one moment: the tightest of a few tries, in case we were interrupted."""
    tries = []
    for _ in range(20):
        before = time.monotonic_ns()
        ticks = read()
        after = time.monotonic_ns()
        tries.append((after - before, ticks, (before + after) // 2))
    _, ticks, moment = min(tries)
    return ticks, moment


@cache
def _code() -> tuple[Callable[[], int], object]:
    """The instruction as a function, and the memory it lies in, which must live as long."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(_RDTSC)
    held = ctypes.c_char.from_buffer(memory)
    return ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(held)), held
