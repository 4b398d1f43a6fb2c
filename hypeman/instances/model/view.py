"""Renders a record for clients. Pure; fields that are not echoed (§2.5) never get here."""

from __future__ import annotations

from datetime import datetime
from signal import SIGKILL, SIGRTMAX, SIGRTMIN, Signals

from msgspec import UNSET

from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import Instance, InstanceGpu, InstanceNetwork, InstanceState
from hypeman.instances.model.validate import guest_env
from hypeman.network.types import Lease
from hypeman.text import without_host_paths
from hypeman.units import format_rate, format_size


def shown_error(record: InstanceRecord) -> str | None:
    """Why the state is not known, if so; the host's paths are only in the server's log."""
    known = record.state is not InstanceState.UNKNOWN or record.state_error is None
    return None if known else without_host_paths(record.state_error or "")


def render_instance(record: InstanceRecord, lease: Lease | None, *, mdev_uuid: str, now: datetime) -> Instance:
    """``now`` is only used for the duration of the current phase."""
    spec = record.spec
    return Instance(
        id=record.id,
        name=record.name,
        image=spec.image,
        state=record.state,
        created_at=record.created_at,
        expires_at=record.expires_at,
        platform=spec.platform,
        state_error=shown_error(record),
        size=format_size(spec.memory_bytes),
        hotplug_size=format_size(spec.hotplug_bytes) if spec.hotplug_bytes else UNSET,
        overlay_size=format_size(spec.overlay_bytes),
        vcpus=spec.vcpus,
        disk_io_bps=format_rate(spec.disk_io_bps) if spec.disk_io_bps else UNSET,
        env=dict(guest_env(spec)) or UNSET,
        tags=spec.tags or UNSET,
        network=_network(record, lease),
        volumes=spec.volumes or UNSET,
        ports=(lease.ports if lease is not None else ()) or UNSET,
        gpu=InstanceGpu(profile=spec.gpu_profile, mdev_uuid=mdev_uuid) if spec.gpu_profile else UNSET,
        started_at=record.started_at,
        stopped_at=record.stopped_at,
        exit_code=record.exit_code,
        exit_message=record.exit_message if record.exit_message is not None else UNSET,
        has_snapshot=record.capture is not None and record.state is InstanceState.STANDBY,
        hypervisor=spec.hypervisor,
        snapshot_policy=spec.snapshot_policy or UNSET,
        auto_standby=spec.auto_standby or UNSET,
        health_check=spec.health_check or UNSET,
        restart_policy=spec.restart_policy or UNSET,
        auto_remove=spec.auto_remove or UNSET,
        phase_durations_ms=record.phases.durations_ms(now),
        current_phase=record.phases.current,
        current_phase_since=record.phases.since,
    )


def _network(record: InstanceRecord, lease: Lease | None) -> InstanceNetwork:
    if lease is None or not lease.enabled:
        return InstanceNetwork(enabled=record.spec.network)
    return InstanceNetwork(
        enabled=True,
        name="default",
        ip=lease.ipv4,
        mac=lease.mac,
        bandwidth_download=format_rate(lease.download_bps) if lease.download_bps else UNSET,
        bandwidth_upload=format_rate(lease.upload_bps) if lease.upload_bps else UNSET,
        egress=record.spec.access or UNSET,
        groups=record.spec.groups or UNSET,
    )


def describe_exit(code: int, signal: int, *, out_of_memory: bool) -> str:
    """Human-readable reason why the workload ended; ``signal`` is 0 if it exited normally."""
    if signal or out_of_memory:
        number = signal or SIGKILL
        cause = f"killed by signal {number} ({_signal_name(number)})"
        return f"{cause} - OOM" if out_of_memory else cause
    return _EXIT_MESSAGES.get(code, f"exited with code {code}")


_EXIT_MESSAGES = {126: "command cannot be executed", 127: "command not found"}
"""Meaning of a shell's exit codes; the rest are program-specific."""


def _signal_name(number: int) -> str:
    """``SIGKILL`` for 9, ``SIGRTMIN+3`` for 37. Linux guests have the same numbers as this host."""
    if SIGRTMIN < number < SIGRTMAX:
        return f"SIGRTMIN+{number - SIGRTMIN}"
    try:
        return Signals(number).name
    except ValueError:
        return "unknown signal"
