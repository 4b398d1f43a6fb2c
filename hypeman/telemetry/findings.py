"""What ``hypeman doctor`` reports: one finding per check."""

from __future__ import annotations

import enum

from msgspec import Struct


class Verdict(enum.StrEnum):
    OK = "ok"
    WARN = "warn"
    """Works, but less well, less safely or not for every user."""
    FAIL = "fail"
    """Something requested cannot work in this configuration."""


class Finding(Struct, frozen=True, kw_only=True):
    """The result of one check on this host."""

    name: str
    """Short and stable, as in ``kvm`` or ``tun``."""
    verdict: Verdict
    message: str
    """What was found."""
    remedy: str = ""
    """Command or change that fixes it."""


def worst(findings: tuple[Finding, ...]) -> Verdict:
    """The verdict over all of them."""
    order = list(Verdict)
    return max((finding.verdict for finding in findings), key=order.index, default=Verdict.OK)
