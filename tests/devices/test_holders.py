"""Which functions the host itself needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypeman.host.holders import holders
from tests.devices.trees import FakeFunction, Tree

DISK, NIC, OTHER, USB = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"
ROUTES = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"


@pytest.fixture
def host(tree: Tree) -> Tree:
    for group, address in enumerate((DISK, NIC, OTHER, USB)):
        tree.add(FakeFunction(address=address, group=group))
    (tree.root / "proc/self").mkdir(parents=True)
    (tree.root / "proc/net").mkdir()
    return tree


def block(tree: Tree, number: str, path: Path, *parts: Path) -> Path:
    """A block device, made of ``parts``."""
    (path / "slaves").mkdir(parents=True)
    for part in parts:
        (path / "slaves" / part.name).symlink_to(part)
    (tree.root / "dev/block" / number).symlink_to(path)
    return path


def interface(tree: Tree, name: str, path: Path, *lower: str) -> None:
    path.mkdir(parents=True)
    (tree.root / "class/net" / name).symlink_to(path)
    for part in lower:
        (path / f"lower_{part}").symlink_to((tree.root / "class/net" / part).resolve())


def mounts(tree: Tree, *lines: str) -> None:
    (tree.root / "proc/self/mountinfo").write_text("".join(line + "\n" for line in lines))


def held(tree: Tree, uplink: str = "") -> dict[str, str]:
    return holders(tree.root, tree.root / "proc", uplink=uplink)


def test_no_holder_without_mounts_and_routes(host: Tree) -> None:
    assert held(host) == {}


def test_a_partition_that_is_mounted(host: Tree) -> None:
    disk = block(host, "8:0", host.path(DISK) / "ata1/block/sda")
    part = block(host, "8:1", disk / "sda1")
    (part / "partition").write_text("1\n")
    mounts(host, r"30 1 8:1 / /mnt/a\040b rw shared:1 - ext4 /nowhere rw", "31 1 0:5 / /proc rw - proc proc rw")
    assert held(host) == {DISK: "holds /mnt/a b"}


def test_down_through_crypt_lvm_and_raid_to_every_disk(host: Tree) -> None:
    first = block(host, "8:0", host.path(DISK) / "block/sda")
    second = block(host, "8:16", host.path(OTHER) / "block/sdb")
    part = block(host, "8:17", second / "sdb1")
    (part / "partition").write_text("1\n")
    raid = block(host, "9:0", host.root / "devices/virtual/block/md0", first, part)
    block(host, "253:0", host.root / "devices/virtual/block/dm-0", raid)
    mounts(host, "30 1 253:0 / / rw - ext4 /dev/mapper/root rw")
    assert held(host) == {DISK: "holds /", OTHER: "holds /"}


def test_a_loop_among_the_parts_ends(host: Tree) -> None:
    one, two = (host.root / "devices/virtual/block" / name for name in ("dm-0", "dm-1"))
    block(host, "253:0", one, two)
    block(host, "253:1", two, one)
    mounts(host, "30 1 253:0 / / rw - ext4 x rw")
    assert held(host) == {}


def test_nvme_with_multipath_hangs_below_its_subsystem(host: Tree) -> None:
    controller = host.path(DISK) / "nvme/nvme0"
    controller.mkdir(parents=True)
    subsystem = host.root / "devices/virtual/nvme-subsystem/nvme-subsys0"
    block(host, "259:0", subsystem / "nvme0n1")
    (subsystem / "nvme0").symlink_to(controller)
    mounts(host, "30 1 259:0 / / rw - ext4 x rw")
    assert held(host) == {DISK: "holds /"}


def test_a_disk_behind_a_controller_behind_a_bridge_holds_all_of_them(host: Tree) -> None:
    path = host.path(USB) / OTHER / "usb1/block/sdc"
    block(host, "8:32", path)
    mounts(host, "30 1 8:32 / / rw - ext4 x rw")
    assert held(host).keys() == {USB, OTHER}


def test_swap_on_a_file_holds_the_disk_below_it(host: Tree, tmp_path: Path) -> None:
    file = tmp_path / "swap"
    file.touch()
    device = file.stat().st_dev
    block(host, f"{device >> 8 & 0xFFF}:{device & 0xFF}", host.path(DISK) / "block/sda")
    (host.root / "proc/swaps").write_text(f"Filename Type Size Used Priority\n{file} file 1 0 -2\n")
    assert held(host) == {DISK: "holds swap"}


def test_interfaces_with_routes_through_bonds_and_vlans(host: Tree) -> None:
    interface(host, "eth0", host.path(NIC) / "net/eth0")
    interface(host, "eth1", host.path(OTHER) / "net/eth1")
    interface(host, "bond0", host.root / "devices/virtual/net/bond0", "eth0")
    interface(host, "bond0.7", host.root / "devices/virtual/net/bond0.7", "bond0")
    routes = ROUTES + "bond0.7 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0\neth1 0001A8C0 0 1 0 0 0 00FFFFFF 0 0 0\n"
    (host.root / "proc/net/route").write_text(routes)
    assert held(host) == {NIC: "carries the default route (bond0.7)", OTHER: "carries a route (eth1)"}


def test_ipv6_routes_count_link_local_ones_do_not(host: Tree) -> None:
    interface(host, "eth0", host.path(NIC) / "net/eth0")
    interface(host, "eth1", host.path(OTHER) / "net/eth1")
    zero = "0" * 32
    (host.root / "proc/net/ipv6_route").write_text(
        f"{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 1 0 00000003 eth0\n"
        f"fe800000000000000000000000000000 40 {zero} 00 {zero} 00000100 1 0 00000001 eth1\n"
        f"ff000000000000000000000000000000 08 {zero} 00 {zero} 00000100 1 0 00000001 eth1\n"
        f"{zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n"
    )
    assert held(host) == {NIC: "carries the default route (eth0)"}


def test_the_uplink_of_the_settings_is_held_without_routes(host: Tree) -> None:
    interface(host, "eth0", host.path(NIC) / "net/eth0")
    assert held(host, uplink="eth0") == {NIC: "is the uplink (eth0)"}


def test_rubbish_in_proc_holds_nothing(host: Tree) -> None:
    mounts(host, "", "- - -", "1 2", "a b c d e f g h - -")
    (host.root / "proc/swaps").write_text("")
    (host.root / "proc/net/route").write_text("x\ny\n")
    (host.root / "proc/net/ipv6_route").write_text("\n1 2 3\n")
    assert held(host) == {}
