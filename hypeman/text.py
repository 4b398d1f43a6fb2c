"""Makes text from others (guests, images, registries, clients) safe to print. Pure.

A control character in such text is data: it must not start a new line of a log, or move the cursor or
change the title of an operator's terminal.
"""

from __future__ import annotations

import re

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# C0, DEL and C1; line and paragraph separators; characters that change the direction of what follows; and
# surrogates, which cannot be written as UTF-8.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_ONE_LINE = re.compile(f"[{_CONTROL}]")
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")
_HOST_PATH = re.compile(r"(?<![\w./:-])/(?:[^\s/:;,'\"()]+/)+([^\s/:;,'\"()]*)")
_LINES = re.compile(f"(?![\n\t])[{_CONTROL}]")


def one_line(text: str) -> str:
    """``text`` on one line, every control character written as an escape (``\\n``, ``\\x1b``)."""
    return _ONE_LINE.sub(_escape, text)


def lines(text: str) -> str:
    """``text`` with its line feeds and tabs kept and every other control character written as an escape."""
    return _LINES.sub(_escape, text)


def lines_with_colours(text: str) -> str:
    """``lines``, but keeps colours: for text coloured by us, whose untrusted parts were escaped before that."""
    parts = _COLOUR.split(text)
    return "".join(part if at % 2 else lines(part) for at, part in enumerate(parts))


def without_host_paths(text: str) -> str:
    """``text`` with absolute paths reduced to their last component: where the host keeps its files is no client's
    business."""
    return _HOST_PATH.sub(r"\1", text)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    number = ord(character)
    return _SHORT.get(character) or (f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}")
