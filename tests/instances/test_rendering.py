"""What is made of a record: the answer to clients, the VMM's configuration and the guest's. Every field comes from
where it belongs, and a field that is added has to be decided on here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from hypeman.egress.types import AccessDefault, EgressAccess
from hypeman.guest.boot import BootConfig, CaCertificate, Pid1, Ulimit
from hypeman.guest.boot import GuestNetwork as BootNetwork
from hypeman.guest.boot import GuestVolume as BootVolume
from hypeman.hypervisor.interface import Disk, Nic, PciDevice, VmConfig
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.images.types import ImageConfig
from hypeman.instances.model.guest_boot import boot_config, machine_id
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    HealthCheck,
    Instance,
    InstanceGpu,
    InstanceNetwork,
    InstanceState,
    RestartPolicy,
    SnapshotPolicy,
    VolumeMount,
)
from hypeman.instances.model.view import render_instance
from hypeman.instances.model.vm import Environment, vm_config, vm_disks, volume_disk_id, volume_overlay_disk_id
from hypeman.network.types import GuestNetwork, Lease, PortMapping
from hypeman.paths import Paths
from tests.fakes.fake_vmm import ALL
from tests.instances.test_record import NOW, SOURCE, SPEC, THEN

VOLUMES = (
    VolumeMount(volume_id="base", mount_path="/base", readonly=True, overlay=True),
    VolumeMount(volume_id="data", mount_path="/data"),
)
RECORD = replace(
    SOURCE,
    spec=replace(SPEC, network=True, volumes=VOLUMES, tags={"hypeman.shm-size": "2MB", "hypeman.pid1": "true"}),
    ports={"data": 3},
)
PORTS = (PortMapping(host_port=80, guest_port=8080),)
LEASE = Lease(
    instance_id="source", cid=7, ipv4="10.0.0.2", mac="02:00:00:00:00:07", tap="hm-7", download_bps=1 << 20,
    upload_bps=2 << 20, ports=PORTS,
)  # fmt: skip
PATHS = Paths(Path("/data"), Path("/run"))
DISKS = vm_disks(RECORD, Path("/root.erofs"), PATHS, hotplug=True)


def still_default(made: msgspec.Struct) -> set[str]:
    """The fields that have their default, so that nothing is seen of them."""
    return {
        field.name
        for field in msgspec.structs.fields(type(made))
        if field.default is not msgspec.NODEFAULT and getattr(made, field.name) == field.default
    }


# ── Clients ──────────────────────────────────────────────────────────────────────────────────────


def view(record: InstanceRecord, lease: Lease | None = LEASE) -> Instance:
    return render_instance(record, lease, mdev_uuid="uuid", now=NOW)


def test_the_answer_to_clients() -> None:
    shown = view(replace(RECORD, state=InstanceState.STANDBY))
    assert shown == Instance(
        id="source",
        name="source",
        image="web",
        state=InstanceState.STANDBY,
        created_at=THEN,
        expires_at=NOW,
        platform="linux/amd64",
        size="1GB",
        hotplug_size="512MB",
        overlay_size="2GB",
        vcpus=3,
        disk_io_bps="1B/s",
        env={"A": "b", "KEY": "mock-KEY"},
        tags=RECORD.spec.tags,
        network=InstanceNetwork(
            enabled=True, name="default", ip="10.0.0.2", mac="02:00:00:00:00:07", bandwidth_download="1MB/s",
            bandwidth_upload="2MB/s", egress=EgressAccess(default=AccessDefault.DENY), groups=("backend",),
        ),
        volumes=VOLUMES,
        ports=PORTS,
        gpu=InstanceGpu(profile="p", mdev_uuid="uuid"),
        started_at=THEN,
        stopped_at=THEN,
        exit_code=1,
        exit_message="m",
        has_snapshot=True,
        hypervisor=HypervisorKind.QEMU,
        snapshot_policy=SnapshotPolicy(),
        auto_standby=AutoStandbyPolicy(),
        health_check=HealthCheck(),
        restart_policy=RestartPolicy(),
        auto_remove=True,
        phase_durations_ms={"created": 5, "running": 24 * 3600 * 1000},
        current_phase="running",
        current_phase_since=THEN,
    )  # fmt: skip
    assert still_default(shown) == {"state_error", "health_status", "restart_status", "guest_silent_since"}, (
        "the reason is Unknown's alone; the rest is filled in by others"
    )


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"hotplug_bytes": 0}, "hotplug_size"),
        ({"disk_io_bps": 0}, "disk_io_bps"),
        ({"env": {}, "credentials": {}}, "env"),
        ({"tags": {}}, "tags"),
        ({"volumes": ()}, "volumes"),
        ({"gpu_profile": ""}, "gpu"),
        ({"snapshot_policy": None}, "snapshot_policy"),
        ({"auto_standby": None}, "auto_standby"),
        ({"health_check": None}, "health_check"),
        ({"restart_policy": None}, "restart_policy"),
    ],
)
def test_what_was_not_requested_is_not_shown(change: dict[str, Any], absent: str) -> None:
    full = view(RECORD)
    without = view(replace(RECORD, spec=replace(RECORD.spec, **change)))
    assert getattr(without, absent) is msgspec.UNSET
    assert replace(without, **{absent: getattr(full, absent)}) == full, "nothing else changes"


def test_a_network_that_is_not_there() -> None:
    bare = replace(LEASE, download_bps=0, upload_bps=0, ports=())
    record = replace(RECORD, spec=replace(RECORD.spec, access=None, groups=()))
    assert view(record, bare).network == InstanceNetwork(enabled=True, name="default", ip=bare.ipv4, mac=bare.mac)
    assert view(record, bare).ports is msgspec.UNSET
    assert view(record, None).network == InstanceNetwork(enabled=True) and view(record, None).ports is msgspec.UNSET
    off = replace(record, spec=replace(record.spec, network=False))
    assert view(off, Lease(instance_id="source", cid=7)).network == InstanceNetwork(enabled=False)


@pytest.mark.parametrize(
    ("state", "capture", "shown"),
    [
        (InstanceState.STANDBY, "c", True),
        (InstanceState.STANDBY, None, False),
        (InstanceState.RUNNING, "c", False),
    ],
)
def test_only_a_standby_can_be_restored(state: InstanceState, capture: str | None, shown: bool) -> None:
    assert view(replace(RECORD, state=state, capture=capture)).has_snapshot is shown


def test_why_an_instance_is_unknown_without_paths_of_the_host() -> None:
    reason = "cannot open /data/instances/source/overlay.raw"
    reported = view(replace(RECORD, state=InstanceState.UNKNOWN, state_error=reason)).state_error
    assert reported is not None and reported.startswith("cannot open") and "/data/" not in reported
    assert view(replace(RECORD, state=InstanceState.UNKNOWN, state_error=None)).state_error is None
    assert view(replace(RECORD, state=InstanceState.RUNNING, state_error=reason)).state_error is None


# ── The VMM ──────────────────────────────────────────────────────────────────────────────────────

AROUND = Environment(
    root_disk=Path("/root.erofs"), kernel="/kernel", initrd="/initrd", cmdline="quiet", lease=LEASE, mtu=1400,
    devices=("/sys/a", "/sys/b"), uid=1007, vsock=True, hotplug=True, cgroup="/vms/source",
)  # fmt: skip


def test_the_configuration_of_the_vmm() -> None:
    mine = PATHS.instance("source")
    made = vm_config(RECORD, AROUND, PATHS)
    assert made == VmConfig(
        instance_id="source",
        name="source",
        vcpus=3,
        memory_bytes=1 << 30,
        hotplug_bytes=1 << 29,
        kernel="/kernel",
        initrd="/initrd",
        cmdline="quiet",
        disks=DISKS,
        nics=(Nic(id="net0", tap="hm-7", mac="02:00:00:00:00:07", mtu=1400),),
        pci_devices=(PciDevice(id="dev0", sysfs_path="/sys/a"), PciDevice(id="dev1", sysfs_path="/sys/b")),
        run_dir=str(mine.run),
        jail=str(mine.jail),
        console_log=str(mine.log("app")),
        vmm_log=str(mine.log("vmm")),
        vsock_cid=7,
        uid=1007,
        gid=1007,
        cgroup="/vms/source",
        disk_ports=8,
    )
    assert still_default(made) == {"disk_ports"}


def test_the_vmm_gets_nothing_that_is_not_there() -> None:
    made = vm_config(RECORD, replace(AROUND, lease=None, vsock=True, hotplug=False), PATHS)
    assert (made.nics, made.vsock_cid, made.disk_ports) == ((), 0, 0)
    assert [disk.port for disk in made.disks] == [0] * len(DISKS)
    assert vm_config(RECORD, replace(AROUND, lease=Lease(instance_id="source", cid=7)), PATHS).nics == ()
    assert vm_config(RECORD, replace(AROUND, vsock=False), PATHS).vsock_cid == 0


def test_the_disks_of_a_vm() -> None:
    """A volume with a write layer is two disks; limits are for the instance's own."""
    mine = PATHS.instance("source")
    assert (
        Disk(id="root", path="/root.erofs", readonly=True, shared=True, bps=1),
        Disk(id="overlay", path=str(mine.overlay), bps=1),
        Disk(id="boot", path=str(mine.boot_disk)),
        Disk(id=volume_disk_id("base"), path=str(PATHS.volume_disk("base")), readonly=True, shared=True),
        Disk(id=volume_overlay_disk_id("base"), path=str(mine.volume_overlay("base"))),
        Disk(id=volume_disk_id("data"), path=str(PATHS.volume_disk("data")), port=3),
    ) == DISKS
    assert volume_overlay_disk_id("base")[1:] == volume_disk_id("base")[1:]
    assert len({disk.id for disk in DISKS}) == len(DISKS)


# ── The guest ────────────────────────────────────────────────────────────────────────────────────

IMAGE = ImageConfig(
    entrypoint=("/entry",), cmd=("arg",), env={"A": "image", "PATH": "/bin", "KEY": "image", "PROXY": "image"},
    user="image", working_dir="/image", stop_signal="SIGINT", volumes=("/var/lib", "/srv"),
    labels={
        "hypeman.volumes": "/srv /opt", "hypeman.sysctl.vm.swappiness": "1", "hypeman.ulimit.nofile": "5:6",
        "hypeman.pid1": "false",
    },
)  # fmt: skip
CERTIFICATE = CaCertificate("pem", "01234567")


def boot(record: InstanceRecord, image: ImageConfig = IMAGE, **changes: Any) -> BootConfig:
    arguments: Mapping[str, Any] = {
        "root_fs": "ext4",
        "disks": DISKS,
        "network": GuestNetwork("10.0.0.2", 32, "10.0.0.1", "02:00:00:00:00:07", "10.0.0.53", 1400),
        "egress_env": {"PROXY": "proxy"},
        "certificates": (CERTIFICATE,),
        "able": replace(ALL, disk_serials=False, power_off=False),
        "clock_ns": 5,
    }
    return boot_config(record, image, **{**arguments, **changes})


def test_the_configuration_of_the_guest() -> None:
    made = boot(RECORD)
    assert made == BootConfig(
        instance_id="source",
        hostname="web.example",
        nonce=b"n",
        argv=("/init", "x"),
        env=("A=b", "PATH=/bin", "KEY=mock-KEY", "PROXY=proxy"),
        cwd="/srv",
        user="1000",
        root_fs="ext4",
        volumes=(
            BootVolume(volume_disk_id("base"), "/base", readonly=True, overlay_disk_id=volume_overlay_disk_id("base")),
            BootVolume(volume_disk_id("data"), "/data"),
        ),
        network=BootNetwork("02:00:00:00:00:07", "10.0.0.2", 32, "10.0.0.1", ("10.0.0.53",), 1400),
        ca_certificates=(CERTIFICATE,),
        stop_signal=2,
        grace_seconds=10.0,
        idle=True,
        skip_agent=True,
        machine_id=machine_id("source"),
        clock_ns=5,
        disk_order=tuple(disk.id for disk in DISKS),
        power_off_by_reset=True,
        volume_dirs=("/var/lib", "/srv", "/opt"),
        pid1=Pid1.WORKLOAD,
        shm_bytes=2 << 20,
        sysctls=("vm.swappiness=1",),
        ulimits=(Ulimit(7, 5, 6),),
    )
    assert still_default(made) == {"overlay", "console", "grace_seconds"}


def test_the_guest_has_the_images_settings_where_the_instance_has_none() -> None:
    bare = replace(RECORD, spec=replace(RECORD.spec, hostname="", user="", working_dir="", entrypoint=None, cmd=None))
    made = boot(bare, network=None, able=ALL)
    assert (made.hostname, made.user, made.cwd, made.argv) == ("source", "image", "/image", ("/entry", "arg"))
    assert (made.network, made.disk_order, made.power_off_by_reset) == (None, (), False)


def test_the_current_phase_grows() -> None:
    later = render_instance(RECORD, None, mdev_uuid="", now=NOW + timedelta(milliseconds=7))
    assert later.phase_durations_ms == {"created": 5, "running": 24 * 3600 * 1000 + 7}
