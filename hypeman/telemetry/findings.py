"""What ``hypeman doctor`` tells: one finding for each thing that was looked at."""

from __future__ import annotations

import enum

from msgspec import Struct


class Verdict(enum.StrEnum):
    OK = "ok"
    WARN = "warn"
    """It works, but less well, less safely or not for everybody."""
    FAIL = "fail"
    """Something that was asked for can not work like this."""


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that was looked at on this host."""

    name: str
    """Short and stable, as in ``kvm`` or ``tun``."""
    verdict: Verdict
    message: str
    """What was seen."""
    remedy: str = ""
    """What to type, or to change, for an ``ok``."""


def worst(findings: tuple[Finding, ...]) -> Verdict:
    """The verdict over all of them."""
    order = list(Verdict)
    return max((finding.verdict for finding in findings), key=order.index, default=Verdict.OK)
