"""Host names and patterns with captures, as rules write them. Pure.

``{name}`` stands for one whole label. Two patterns that differ only in the names of their captures have one ``shape``,
since they match the same hosts.
"""

from __future__ import annotations

import re

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_CAPTURE = re.compile(r"\{([a-zA-Z_][a-zA-Z0-9_]*)\}")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
MAX_LENGTH = 253


def parse_hostname(text: str) -> tuple[str, ...]:
    """The labels of a rule's host name, in lower case apart from captures. Raises ValueError with the reason."""
    if not text or len(text) > MAX_LENGTH:
        raise ValueError(f"must have 1 to {MAX_LENGTH} characters")
    if text.startswith("*"):
        raise ValueError("has a wildcard; write a capture such as {name} for one label")
    labels: list[str] = []
    names: set[str] = set()
    for label in text.split("."):
        capture = _CAPTURE.fullmatch(label)
        if capture is not None:
            if capture[1] in names:
                raise ValueError(f"has the capture {{{capture[1]}}} twice")
            names.add(capture[1])
            labels.append(label)
        elif "{" in label or "}" in label:
            raise ValueError(f"has the label {label!r}: a capture {{name}} must be a whole label")
        elif not _LABEL.fullmatch(label.lower()):
            raise ValueError(f"has the invalid label {label!r}")
        else:
            labels.append(label.lower())
    if names and len(labels) < 2:
        raise ValueError("would match every host: a pattern needs at least two labels")
    return tuple(labels)


def capture_of(label: str) -> str | None:
    """The name of the capture that the label is."""
    return label[1:-1] if label.startswith("{") else None


def captures(labels: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for label in labels if (name := capture_of(label)) is not None)


def shape(hostname: str) -> str:
    """The same for all host names that match the same hosts."""
    return _CAPTURE.sub("{}", hostname)


def references(target: str) -> frozenset[str]:
    """The captures that a target names. Raises ValueError for braces that do not name one."""
    if "{" in _REFERENCE.sub("", target) or "}" in _REFERENCE.sub("", target):
        raise ValueError("has an unmatched brace")
    return frozenset(_REFERENCE.findall(target))
