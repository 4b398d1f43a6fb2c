"""What a fork keeps of its source: every field of record and spec is decided on here."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from hypeman.egress.types import (
    AccessDefault,
    CredentialPolicy,
    CredentialSource,
    EgressAccess,
    EgressEnforcementMode,
    InjectAs,
    InjectRule,
)
from hypeman.hypervisor.interface import VmConfig, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.record import InstanceRecord, InstanceSpec, StopCause, forked
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    HealthCheck,
    InstanceState,
    RestartPolicy,
    SnapshotPolicy,
    VolumeMount,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
THEN = NOW - timedelta(days=1)
RULE = InjectRule(hosts=("api.example.com",), as_=InjectAs(header="Authorization", format="Bearer ${value}"))

SPEC = InstanceSpec(
    image="web", platform="linux/amd64", hypervisor=HypervisorKind.QEMU, vcpus=3, memory_bytes=1 << 30,
    hotplug_bytes=1 << 29, overlay_bytes=1 << 31, disk_io_bps=1, env={"A": "b"},
    credentials={"KEY": CredentialPolicy(source=CredentialSource(env="REAL"), inject=(RULE,))}, tags={"a": "b"},
    network=False, download_bps=2, upload_bps=3, egress=EgressEnforcementMode.ALL,
    groups=("backend",), access=EgressAccess(default=AccessDefault.DENY), devices=("gpu",),
    gpu_profile="p", volumes=(VolumeMount(volume_id="v", mount_path="/v", readonly=True),), entrypoint=("/init",),
    cmd=("x",), user="1000", working_dir="/srv", hostname="web.example",
    idle=True, skip_guest_agent=True, snapshot_policy=SnapshotPolicy(), auto_standby=AutoStandbyPolicy(),
    health_check=HealthCheck(), restart_policy=RestartPolicy(), auto_remove=True,
)  # fmt: skip
CONFIG = VmConfig(
    instance_id="source", name="source", vcpus=3, memory_bytes=1 << 30, kernel="/k", initrd=None, cmdline="",
    disks=(), run_dir="/r", console_log="/c", vmm_log="/v", jail="/j",
)  # fmt: skip
HANDLE = VmmHandle(HypervisorKind.QEMU, 1, 2, "boot", "/r", CONFIG)
SOURCE = InstanceRecord(
    id="source", name="source", number=7, spec=SPEC, digest="sha256:1", state=InstanceState.RUNNING, created_at=THEN,
    phases=Phases("running", THEN, {"created": 5}), state_error="e", was=InstanceState.PAUSED, expires_at=NOW,
    started_at=THEN, stopped_at=THEN, exit_code=1, exit_message="m", boots=4, nonce=b"n", handle=HANDLE, capture="c",
    mapped="d", ports={"v": 2}, fresh=False, deleting=True, stop_cause=StopCause.HOST,
)  # fmt: skip

KEPT = {"digest", "boots", "nonce", "ports"}
SPEC_NOT_KEPT = {"credentials", "hostname", "auto_remove"}


def changed(before: msgspec.Struct, after: msgspec.Struct) -> set[str]:
    return {field for field in before.__struct_fields__ if getattr(before, field) != getattr(after, field)}


def test_every_field_of_the_source_is_set_here() -> None:
    """Otherwise the tests below would not see whether a new field is kept."""
    for struct in (SPEC, SOURCE):
        for field in msgspec.structs.fields(type(struct)):
            if field.default is not msgspec.NODEFAULT and field.name != "fresh":
                assert getattr(struct, field.name) != field.default, field.name


def test_a_fork_keeps_what_is_named() -> None:
    fork = forked(SOURCE, instance_id="fork", name="two", now=NOW)
    assert set(SOURCE.__struct_fields__) - changed(SOURCE, fork) == KEPT
    assert changed(SPEC, fork.spec) == SPEC_NOT_KEPT
    assert (fork.id, fork.name, fork.state, fork.fresh) == ("fork", "two", InstanceState.STOPPED, True)
    assert fork.phases == Phases("stopped", NOW)
    assert (fork.capture, fork.handle, fork.expires_at) == (None, None, None)


def test_a_fork_on_a_capture_is_in_standby() -> None:
    fork = forked(SOURCE, instance_id="fork", name="two", now=NOW, capture="e", hypervisor=HypervisorKind.FIRECRACKER)
    assert (fork.state, fork.phases.current, fork.capture) == (InstanceState.STANDBY, "standby", "e")
    assert fork.spec.hypervisor is HypervisorKind.FIRECRACKER
