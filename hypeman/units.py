"""Parses and formats human-readable sizes, rates and durations.

The program itself uses only bytes, bytes per second and seconds. The text forms are those of the API
contract: §1.6 (Go durations) and §1.7 (sizes and rates). Output always parses back to the
same value.
"""

from __future__ import annotations

import re
from decimal import Decimal

from hypeman.errors import InvalidRequest

MIB = 1 << 20
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB", "EB")
_SIZE = re.compile(r"\s*([0-9]{1,19})\s*([kmgtpe]?b?)\s*", re.IGNORECASE)
_BITS = re.compile(r"([0-9]{1,19})([kmg]?)bps")
_BITS_MULTIPLE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_MAX_INT64 = 2**63 - 1

_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_NANOSECONDS = {
    "ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9,
}  # fmt: skip


def parse_size(text: str, *, code: str = "invalid_request") -> int:
    """Bytes in ``text``: an integer with an optional binary unit ("512MB" is 512 · 2^20).

    Raises InvalidRequest with ``code`` if the text is not a size or does not fit in 63 bits.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r} is not a size; write an integer and a unit, as in 512MB or 2GB", code=code)
    unit = match[2].upper()
    power = "BKMGTPE".index(unit[0]) if unit else 0
    value = int(match[1]) << (10 * power)
    if value > _MAX_INT64:
        raise InvalidRequest(f"{text!r} is larger than any disk or memory", code=code)
    return value


def format_size(value: int) -> str:
    """The largest binary unit that divides ``value`` bytes exactly: 2 GiB is "2GB", 1.5 GiB "1536MB"."""
    power = 0
    while value and value % 1024 == 0 and power < len(_UNITS) - 1:
        value //= 1024
        power += 1
    return f"{value}{_UNITS[power]}"


def parse_rate(text: str, *, code: str = "invalid_request") -> int:
    """Bytes per second in ``text``: "100mbps" counts decimal bits, "12MB/s" or "12MB" binary bytes."""
    lowered = text.strip().lower()
    bits = _BITS.fullmatch(lowered)
    if bits is None:
        return parse_size(lowered.removesuffix("/s"), code=code)
    return int(bits[1]) * _BITS_MULTIPLE[bits[2]] // 8


def parse_disk_rate(text: str, *, code: str = "invalid_disk_io_bps") -> int:
    """Bytes per second in ``text``: a size with an optional "/s" or "ps" suffix."""
    return parse_size(text.strip().lower().removesuffix("/s").removesuffix("ps"), code=code)


def format_rate(value: int) -> str:
    """``value`` bytes per second as a size with the suffix "/s"."""
    return format_size(value) + "/s"


def parse_duration(text: str, *, code: str = "invalid_request") -> float:
    """Seconds in a Go duration such as "1h30m", "250ms" or "0". No sign, no days."""
    if text == "0":
        return 0.0
    position, total = 0, Decimal(0)
    while position < len(text):
        match = _DURATION_PART.match(text, position)
        if match is None:
            break
        total += Decimal(match[1]) * _NANOSECONDS[match[2]]
        position = match.end()
    if not text or position < len(text):
        raise InvalidRequest(f"{text!r} is not a duration; write numbers with units, as in 90s, 5m or 1h30m", code=code)
    if total > _MAX_INT64:
        raise InvalidRequest(f"duration {text!r} is too long", code=code)
    return float(total / 10**9)


def format_duration(seconds: float) -> str:
    """Canonical Go form: 300 is "5m0s", 0.25 is "250ms", 0 is "0s"."""
    nanoseconds = round(seconds * 10**9)
    if nanoseconds == 0:
        return "0s"
    for unit, size in (("ns", 1), ("µs", 10**3), ("ms", 10**6)):
        if nanoseconds < size * 1000:
            return _trim(Decimal(nanoseconds) / size) + unit
    hours, rest = divmod(nanoseconds, _NANOSECONDS["h"])
    minutes, rest = divmod(rest, _NANOSECONDS["m"])
    text = _trim(Decimal(rest) / 10**9) + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _trim(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
