"""What the host has, as a node's capacity, allocatable and conditions. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from datetime import datetime

from hypeman.devices.types import Device
from hypeman.instances.model.types import Instance
from hypeman.kube import names
from hypeman.kube.devices import device_class
from hypeman.kube.types import Condition
from hypeman.resources.types import Resources

DISK_PRESSURE = 0.05
"""Free part of the disk itself, however much of it is promised, below which the node reports pressure: the cluster
then sends no pods."""
MAX_SKEW = 30.0
"""Seconds by which a clock may differ from the API server's before the node reports it."""


def capacity(
    resources: Resources, devices: Iterable[Device], instances: Iterable[Instance], max_pods: int
) -> dict[str, str]:
    """All that pods and others may use together, in whole units."""
    found = {
        "cpu": str(resources.cpu.effective_limit),
        "memory": _kibibytes(resources.memory.effective_limit),
        "ephemeral-storage": _kibibytes(resources.disk.effective_limit),
        "pods": str(max_pods),
    }
    classes = Counter(device_class(device) for device in devices if not device.missing)
    found |= {f"{names.GPU}{kind}": str(number) for kind, number in classes.items() if kind}
    used = Counter(instance.gpu.profile for instance in instances if instance.gpu)
    gpu = resources.gpu
    for profile in (gpu.profiles or ()) if gpu is not None else ():
        found[f"{names.VGPU}{slug(profile.name)}"] = str(profile.available + used[profile.name])
    return found


def allocatable(total: dict[str, str], resources: Resources, pods: Iterable[str]) -> dict[str, str]:
    """What pods may use: all but what instances hold that are none; ``pods`` are the ids of those that are."""
    mine = frozenset(pods)
    others = [each for each in resources.allocations if each.instance_id not in mine]
    cpu = sum(each.cpu or 0 for each in others)
    memory = sum(each.memory_bytes or 0 for each in others)
    disk = sum(each.disk_bytes or 0 for each in others)
    return {
        **total,
        "cpu": str(max(0, resources.cpu.effective_limit - cpu)),
        "memory": _kibibytes(max(0, resources.memory.effective_limit - memory)),
        "ephemeral-storage": _kibibytes(max(0, resources.disk.effective_limit - disk)),
    }


def profile_names(resources: Resources) -> dict[str, str]:
    """Suffix of the extended resource → name of the vGPU profile."""
    gpu = resources.gpu
    return {slug(profile.name): profile.name for profile in ((gpu.profiles or ()) if gpu is not None else ())}


def slug(name: str) -> str:
    """``name`` as a part of a resource's name: ``NVIDIA L40S-1Q`` is ``nvidia-l40s-1q``."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:50]


def conditions(
    resources: Resources, before: Iterable[Condition], now: datetime, *, clock_ahead: float = 0.0
) -> tuple[Condition, ...]:
    """Those that a kubelet reports, and one about the clock. The node is Ready: the server has answered."""
    disk = resources.disk
    full = disk.capacity > 0 and disk.available < DISK_PRESSURE * disk.capacity
    known = {each.type: each for each in before}
    return tuple(
        _condition(known.get(name), name, value, reason, message, now)
        for name, value, reason, message in (
            ("MemoryPressure", False, "KubeletHasSufficientMemory", "guests have memory of their own"),
            ("DiskPressure", full, "KubeletHasDiskPressure" if full else "KubeletHasNoDiskPressure",
             f"{disk.available} of {disk.capacity} bytes are free"),
            ("PIDPressure", False, "KubeletHasSufficientPID", "guests have processes of their own"),
            ("ClockSkewed", abs(clock_ahead) > MAX_SKEW, *about_clock(clock_ahead)),
            ("Ready", True, "KubeletReady", "the server of this host answers"),
        )
    )  # fmt: skip


def about_clock(ahead: float) -> tuple[str, str]:
    """Reason and message."""
    if abs(ahead) <= MAX_SKEW:
        return "ClockAgrees", "this host's clock agrees with the API server's"
    return "ClockAhead" if ahead > 0 else "ClockBehind", f"{difference(ahead)}: one of them is wrong"


def difference(ahead: float) -> str:
    """In words; ``ahead`` in seconds."""
    return f"this host's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the API server's"


def _condition(before: Condition | None, name: str, value: bool, reason: str, message: str, now: datetime) -> Condition:
    status = "True" if value else "False"
    changed = before.last_transition_time if before is not None and before.status == status else now
    return Condition(
        type=name, status=status, reason=reason, message=message, last_transition_time=changed or now,
        last_heartbeat_time=now,
    )  # fmt: skip


def _kibibytes(value: int) -> str:
    return f"{value // 1024}Ki"
