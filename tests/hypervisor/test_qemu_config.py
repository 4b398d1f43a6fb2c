"""VmConfig to QEMU's command line: one golden file a case (config, dashes, one argument a line).

``HYPEMAN_GOLDEN=write pytest …`` writes the expected half anew; look at the difference before you commit it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.architecture import AMD64, ARM64
from hypeman.errors import InvalidRequest
from hypeman.hypervisor.interface import Disk, Nic, PciDevice, VmConfig
from hypeman.hypervisor.qemu import config as native

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "qemu").glob("*.txt"))
_DASHES = "\n---\n"

PLAIN = VmConfig(
    instance_id="a",
    name="a",
    vcpus=1,
    memory_bytes=256 << 20,
    kernel="/kernel",
    initrd="/initrd",
    cmdline="console=ttyS0",
    disks=(Disk("root", "/root.raw", readonly=True, shared=True), Disk("overlay", "/overlay.raw")),
    run_dir="/run/vm/a",
    jail="/jail",
    console_log="/console",
    vmm_log="/vmm",
)


BOARDS = {"q35": native.Q35, "microvm": native.MICROVM, "virt": native.VIRT}


class Case(msgspec.Struct, forbid_unknown_fields=True):
    """What a golden file holds above the dashes."""

    config: VmConfig
    accelerator: str = "tcg"
    board: str = "q35"
    incoming: bool = False
    private_memory: bool = False
    readonly_file: bool = False


def arguments(case: Case) -> tuple[str, ...]:
    numbers = iter(range(20, 100))
    config = case.config
    machine = ARM64 if case.board == "virt" else AMD64
    fds = native.Descriptors(
        qmp=10,
        agent=11,
        console=12,
        memory=13,
        kernel=None if case.incoming else 14,
        initrd=None if case.incoming or config.initrd is None else 15,
        disks={disk.id: next(numbers) for disk in config.disks},
        nics={nic.id: next(numbers) for nic in config.nics},
    )
    return native.command_line(
        config,
        fds,
        binary=machine.qemu,
        board=BOARDS[case.board],
        accelerator=native.KVM if case.accelerator == "kvm" else native.EMULATORS[machine],
        incoming=case.incoming,
        private_memory=case.private_memory,
        readonly_file=case.readonly_file,
    )


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_golden(file: Path) -> None:
    given, _, expected = file.read_text().partition(_DASHES)
    lines = " ".join(arguments(msgspec.json.decode(given, type=Case))).replace(" -", "\n-") + "\n"
    if os.environ.get("HYPEMAN_GOLDEN") == "write":
        file.write_text(given + _DASHES + lines)
    assert lines == expected


def test_the_other_disks_stay_where_they_are() -> None:
    """Pulling a disk must change no other device's place, or a capture after it could not be loaded."""
    first, second = Disk("one", "/1", port=1), Disk("two", "/2", port=2)
    both = msgspec.structs.replace(PLAIN, disks=(*PLAIN.disks, first, second))
    one = msgspec.structs.replace(PLAIN, disks=(*PLAIN.disks, second))
    device = next(part for part in arguments(Case(one)) if ",id=two," in part)
    assert device in arguments(Case(both))


@given(st.permutations([Disk(f"d{n}", f"/{n}", port=n % 5) for n in range(12)][:9]))
def test_no_two_devices_share_a_place(disks: list[Disk]) -> None:
    one_per_port = {disk.port: disk for disk in reversed(disks) if disk.port}
    fitting = [disk for disk in disks if disk.port == 0 or one_per_port[disk.port] is disk]
    config = msgspec.structs.replace(
        PLAIN, disks=tuple(fitting), nics=tuple(Nic(f"net{n}", "t", "m") for n in range(8)), hotplug_bytes=2 << 20
    )
    native.check(config, native.Q35)
    places = []
    for part in arguments(Case(config)):
        if "addr=" in part:
            places.append(part.partition("addr=")[2].partition(",")[0])
    assert len(places) == len(set(places)) >= 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vcpus": 0}, "vCPUs"),
        ({"memory_bytes": (256 << 20) + 1}, "whole MiB"),
        ({"hotplug_bytes": 1 << 20}, "2 MiB"),
        ({"disks": (Disk("a", "/a"), Disk("a", "/b"))}, "same id"),
        ({"disks": (Disk("A", "/a"),)}, "ids of devices"),
        ({"disks": (Disk("a" * 21, "/a"),)}, "ids of devices"),
        ({"disks": (Disk("balloon", "/a"),)}, "the driver's"),
        ({"disks": (Disk("a", "/a", shared=True),)}, "read-only"),
        ({"disks": (Disk("a", "/a", port=9),)}, "disk ports are 1 to 8"),
        ({"disks": (Disk("a", "/a", port=2), Disk("b", "/b", port=2))}, "same port"),
        ({"disks": tuple(Disk(f"d{n}", "/a") for n in range(25))}, "fixed disks"),
        ({"disk_ports": 25}, "at most 24"),
        ({"nics": tuple(Nic(f"n{n}", "t", "m") for n in range(9))}, "network interfaces"),
        ({"pci_devices": (PciDevice("gpu", "/sys/a,b"),)}, "comma"),
        ({"run_dir": "/" + "x" * 90}, "run_dir"),
    ],
)
def test_what_no_qemu_could_run_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        native.check(msgspec.structs.replace(PLAIN, **changes), native.Q35)


@pytest.mark.parametrize(
    ("version", "machine"),
    [
        ("5.2.0", "pc-q35-5.2"),
        ("6.2.0", "pc-q35-6.2"),
        ("7.2.22", "pc-q35-7.2"),
        ("10.0.3", "pc-q35-7.2"),
        ("", "pc-q35-7.2"),
    ],
)
def test_an_older_qemu_has_the_board_of_its_version(version: str, machine: str) -> None:
    assert native.board_of(native.Q35, version).type == machine
    assert native.board_of(native.MICROVM, version) == native.MICROVM


def test_the_kernel_command_line() -> None:
    assert native.kernel_cmdline("hypeman=1", machine=AMD64).startswith("console=ttyS0 quiet panic=-1 reboot=t ")
    assert native.kernel_cmdline("hypeman=1", machine=AMD64).endswith(" hypeman=1")
    assert "swiotlb=noforce" in native.kernel_cmdline(hotplug_memory=True, machine=AMD64)


def test_the_kernel_command_line_of_arm64() -> None:
    """The PL011 console, and nothing that only a PC has."""
    words = native.kernel_cmdline(machine=ARM64)
    assert words == "console=ttyAMA0 quiet panic=-1 loglevel=1 cryptomgr.notests random.trust_cpu=on"
