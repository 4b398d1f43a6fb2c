"""Profiles, parents and slots of vGPUs. Pure.

A parent makes as many vGPUs as ``available`` says for the type. Claims that are stored but not made
yet (or whose vGPU is still going away) count as made, so that two creates at once never get the same
slot, and a slot whose release is late is not given to the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hypeman.devices.types import VgpuKind, VgpuParent, VgpuRecord, VgpuType
from hypeman.errors import InsufficientResources, InvalidRequest

_SIZE_IN_NAME = re.compile(r"-(\d+)[ABCQ](?:ME)?$")
_BRAND = re.compile(r"^(?:NVIDIA|GRID) ")
_FRAMEBUFFER = re.compile(r"framebuffer=(\d+)M")
_CREATABLE = re.compile(r"^\s*(\d+)\s*:\s*(\S.*?)\s*$", re.MULTILINE)


def profile_name(name: str) -> str:
    """The name as the API has it: "NVIDIA L40S-1Q" is "L40S-1Q"."""
    return _BRAND.sub("", name.strip())


def parse_framebuffer(name: str, description: str = "") -> int:
    """MiB: what the driver says, else what NVIDIA's names say ("L40S-2Q": 2 GiB, "M10-0B": 512 MiB); 0 unknown."""
    found = _FRAMEBUFFER.search(description)
    if found:
        return int(found[1])
    named = _SIZE_IN_NAME.search(name)
    return (int(named[1]) * 1024 or 512) if named else 0


def parse_creatable(text: str) -> tuple[VgpuType, ...]:
    """``creatable_vgpu_types`` of a virtual function: lines "1428 : NVIDIA H200X-141C" below a heading."""
    return tuple(
        VgpuType(number, profile_name(name), parse_framebuffer(name), 1) for number, name in _CREATABLE.findall(text)
    )


def free(parent: VgpuParent, kind: VgpuType, claims: Iterable[VgpuRecord]) -> int:
    """How many more of ``kind`` can be promised on ``parent``."""
    mine = [claim for claim in claims if claim.parent == parent.address]
    if parent.kind is VgpuKind.VENDOR:
        return 0 if mine or parent.made else kind.available
    return max(kind.available - sum(claim.uuid not in parent.made for claim in mine), 0)


def choose(parents: Sequence[VgpuParent], claims: Sequence[VgpuRecord], profile: str) -> tuple[VgpuParent, VgpuType]:
    """Choose the parent for a vGPU of ``profile``: on the card with the fewest vGPUs, then by address.

    ``profile`` is the API's name, the driver's full name or the id of the type. Raises InvalidRequest
    for a profile that no card has, InsufficientResources when no slot is free.
    """
    fitting = [(parent, kind) for parent in parents for kind in parent.types if profile in (kind.name, kind.id)]
    if not fitting:
        known = ", ".join(sorted({kind.name for parent in parents for kind in parent.types})) or "none"
        raise InvalidRequest(f"no card has vGPU profile {profile!r}; known profiles: {known}")
    load: dict[str, int] = {}
    for parent in parents:
        load[parent.gpu] = load.get(parent.gpu, 0) + _used(parent, claims)
    free_ones = [(load[parent.gpu], parent.address, parent, kind)
                 for parent, kind in fitting if free(parent, kind, claims)]  # fmt: skip
    if not free_ones:
        raise InsufficientResources(f"no slot is free for vGPU profile {profile!r}")
    _, _, parent, kind = min(free_ones, key=lambda one: one[:2])
    return parent, kind


def slots(parents: Sequence[VgpuParent], claims: Sequence[VgpuRecord]) -> tuple[int, int]:
    """(total, used). The total of a parent is what it has made and the most it can still make."""
    total = used = 0
    for parent in parents:
        taken = _used(parent, claims)
        more = max((free(parent, kind, claims) for kind in parent.types), default=0)
        total += max(taken + more, 1 if parent.kind is VgpuKind.VENDOR else 0)
        used += taken
    return total, used


def profiles(parents: Sequence[VgpuParent], claims: Sequence[VgpuRecord]) -> list[tuple[str, int, int]]:
    """(name, framebuffer MiB, how many more), by name."""
    found: dict[str, tuple[int, int]] = {}
    for parent in parents:
        for kind in parent.types:
            size, count = found.get(kind.name, (kind.framebuffer_mb, 0))
            found[kind.name] = size, count + free(parent, kind, claims)
    return [(name, size, count) for name, (size, count) in sorted(found.items())]


def _used(parent: VgpuParent, claims: Iterable[VgpuRecord]) -> int:
    mine = [claim.uuid for claim in claims if claim.parent == parent.address]
    if parent.kind is VgpuKind.VENDOR:
        return int(bool(mine or parent.made))
    return len(set(mine) | set(parent.made))
