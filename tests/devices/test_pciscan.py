"""The PCI scan, compiled and in Python: one suite, same answers."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypeman._native import pciscan_py
from tests.devices.trees import FakeFunction, Tree, server
from tests.native import optional

Make = Callable[[str], Any]


def _makers() -> list[Any]:
    if (_pciscan_c := optional("_pciscan_c")) is None:
        return [pytest.param(None, id="c", marks=pytest.mark.skip("not compiled")), pciscan_py.Scanner]
    return [pytest.param(_pciscan_c.Scanner, id="c"), pytest.param(pciscan_py.Scanner, id="py")]


@pytest.fixture(params=_makers())
def make(request: pytest.FixtureRequest) -> Make:
    maker: Make = request.param
    return maker


def test_reads_every_field(make: Make, tree: Tree) -> None:
    """Of a bridge only what identifies it as one; the NUMA node of a bus once."""
    tree.add(FakeFunction(address="0000:01:00.0", total_vfs=4, numa=1, group=7))
    tree.add(FakeFunction(address="0000:01:00.1", driver=None, physfn="0000:01:00.0", group=None, reset=None))
    tree.add(FakeFunction(address="0000:02:00.0", class_code=0x060400, driver="pcieport", group=8, numa=1))
    assert make(str(tree.root)).scan() == [
        ("0000:01:00.0", 0x8086, 0x10D3, 0x020000, 0x8086, 0xA01F, "e1000e", 7, 1, None, 4, "flr bus"),
        ("0000:01:00.1", 0x8086, 0x10D3, 0x020000, 0x8086, 0xA01F, None, -1, 1, "0000:01:00.0", 0, ""),
        ("0000:02:00.0", 0x8086, 0x10D3, 0x060400, 0x8086, 0xA01F, "pcieport", 8, -1, None, 0, ""),
    ]


def test_reads_single_files_where_uevent_is_empty(make: Make, tree: Tree) -> None:
    path = tree.add(FakeFunction(address="0000:01:00.0"))
    (path / "uevent").unlink()
    assert make(str(tree.root)).scan()[0][1:6] == (0x8086, 0x10D3, 0x020000, 0x8086, 0xA01F)


def test_orders_by_address_with_wide_domains_last(make: Make, tree: Tree) -> None:
    addresses = ["0000:00:02.0", "10000:e0:06.0", "0001:00:00.0", "0000:ff:1f.7"]
    tree.add_all(FakeFunction(address=a) for a in addresses)
    found = [row[0] for row in make(str(tree.root)).scan()]
    assert found == ["0000:00:02.0", "0000:ff:1f.7", "0001:00:00.0", "10000:e0:06.0"]


def test_512_functions_are_read_alike_by_both(tree: Tree) -> None:
    _pciscan_c = pytest.importorskip("hypeman._native._pciscan_c")
    functions = list(server(512))
    tree.add_all(functions)
    rows = _pciscan_c.Scanner(str(tree.root)).scan()
    assert rows == pciscan_py.Scanner(str(tree.root)).scan()
    assert {row[0]: row[6] for row in rows} == {f.address: f.driver for f in functions}


def test_passes_over_what_is_no_address_and_says_so(make: Make, tree: Tree) -> None:
    names = ["0000:01:00.0\n", "0000\n:01:00.0", "0000:01:00.8", "000:01:00.0", "x" * 255, "0000:01:00.0.0", "caf\xe9"]
    path = tree.add(FakeFunction(address="0000:01:00.0"))
    for name in names:
        (tree.pci / "devices" / name).symlink_to(path)
    scanner = make(str(tree.root))
    assert [row[0] for row in scanner.scan()] == ["0000:01:00.0"]
    assert sorted(scanner.problems) == sorted((name, errno.EINVAL) for name in names)


def test_loops_files_and_dangling_links_are_problems(make: Make, tree: Tree) -> None:
    devices = tree.pci / "devices"
    (devices / "0000:01:00.0").symlink_to("0000:01:00.1")
    (devices / "0000:01:00.1").symlink_to("0000:01:00.0")
    (devices / "0000:01:00.2").symlink_to("gone")
    (devices / "0000:01:00.3").write_text("a file")
    (devices / "0000:01:00.4").mkdir()
    good = tree.add(FakeFunction(address="0000:02:00.0"))
    for name in ("driver", "iommu_group"):
        (good / name).unlink()
        (good / name).symlink_to(name)
    (good / "reset_method").unlink()
    (good / "reset_method").symlink_to("reset_method")
    scanner = make(str(tree.root))
    assert [row[0] for row in scanner.scan()] == ["0000:02:00.0"]
    assert dict(scanner.problems) == {
        "0000:01:00.0": errno.ELOOP, "0000:01:00.1": errno.ELOOP, "0000:01:00.2": errno.ENOENT,
        "0000:01:00.3": errno.ENOTDIR, "0000:01:00.4": errno.ENOENT,
    }  # fmt: skip


def test_a_missing_directory_is_an_error_naming_it(make: Make, tmp_path: Path) -> None:
    scanner = make(str(tmp_path / "no"))
    for ask in (scanner.scan, scanner.look):
        with pytest.raises(FileNotFoundError, match="bus/pci/devices"):
            ask()


def test_look_reports_changed_drivers_and_devices_gone_new_or_replaced(make: Make, tree: Tree) -> None:
    tree.add_all(FakeFunction(address=f"0000:0{n}:00.0") for n in range(6))
    scanner = make(str(tree.root))
    before = scanner.scan()
    assert scanner.look() == ([], [], [])
    tree.set_driver("0000:02:00.0", "vfio-pci")
    tree.set_driver("0000:01:00.0", None)
    tree.remove("0000:03:00.0")
    tree.add(FakeFunction(address="0000:09:00.0", vendor=1))
    os.link(tree.pci / "devices/0000:04:00.0", tree.root / "kept", follow_symlinks=False)  # its inode stays taken
    tree.remove("0000:04:00.0")
    tree.add(FakeFunction(address="0000:04:00.0", vendor=2, group=9))
    changed, gone, new = scanner.look()
    assert changed == [("0000:01:00.0", None), ("0000:02:00.0", "vfio-pci")]
    assert gone == ["0000:03:00.0", "0000:04:00.0"]
    assert [(row[0], row[1]) for row in new] == [("0000:04:00.0", 2), ("0000:09:00.0", 1)]
    assert scanner.look() == ([], [], [])
    assert len(scanner.scan()) == len(before)


def test_devices_that_come_and_go_during_scans_never_break_one(make: Make, tree: Tree) -> None:
    """Hot-unplug in the middle: what stays is always found, whole; what flickers may be seen or not."""
    stable = [FakeFunction(address=f"0000:{n:02x}:00.0") for n in range(40)]
    tree.add_all(stable)
    stop = threading.Event()

    def flicker() -> None:
        function = FakeFunction(address="0000:80:00.0", group=99)
        while not stop.is_set():
            tree.add(function)
            tree.remove(function.address)

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        scanner = make(str(tree.root))
        for _ in range(60):
            rows = scanner.scan()
            assert [row[0] for row in rows if row[0] != "0000:80:00.0"] == [f.address for f in stable]
            changed, _, _ = scanner.look()
            assert not [a for a, _ in changed if a != "0000:80:00.0"]
    finally:
        stop.set()
        thread.join()


def test_a_group_of_thousands(make: Make, tree: Tree) -> None:
    tree.add_all(FakeFunction(address=f"0000:{n >> 3:02x}:00.{n & 7}", group=5) for n in range(2048))
    assert {row[7] for row in make(str(tree.root)).scan()} == {5}


_CONTENT = st.one_of(
    st.binary(max_size=80),
    st.sampled_from([b"0x8086\n", b"0x", b"0X1f", b"-1\n", b"3\n", b"123456789012", b"PCI_ID=8086:10D3\n", b"\0\0"]),
    st.lists(
        st.sampled_from(
            [b"PCI_ID=1:2", b"PCI_ID=1", b"PCI_ID=:", b"PCI_CLASS=30000", b"PCI_CLASS=", b"PCI_SUBSYS_ID=3:4",
             b"PCI_SUBSYS_ID=123456789:1", b"PCI_ID=0x1:0x2", b"DRIVER=x", b"", b"\0", b"PCI_ID"]
        )
    ).map(b"\n".join),
)  # fmt: skip
_NAMES = ["uevent", "vendor", "device", "class", "subsystem_vendor", "subsystem_device", "numa_node", "sriov_totalvfs",
          "reset_method"]  # fmt: skip
_LINKS = st.one_of(st.sampled_from(["../../a/vfio-pci", "17", "0000:01:00.0", "/", "x" * 255]), st.text(max_size=30))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(st.sampled_from(_NAMES), _CONTENT),
    links=st.dictionaries(st.sampled_from(["driver", "iommu_group", "physfn"]), _LINKS),
)
def test_whatever_the_files_hold_both_say_the_same(
    tree_root: Path, files: dict[str, bytes], links: dict[str, str]
) -> None:
    _pciscan_c = pytest.importorskip("hypeman._native._pciscan_c")
    root = tree_root / "one"
    path = root / "bus/pci/devices/0000:00:00.0"
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    for name, target in links.items():
        try:
            os.symlink(target.encode("utf-8", "replace"), path / name)
        except (OSError, ValueError):
            continue
    compiled, readable = _pciscan_c.Scanner(str(root)), pciscan_py.Scanner(str(root))
    assert compiled.scan() == readable.scan()
    assert compiled.problems == readable.problems
    shutil.rmtree(root)


def test_finds_the_physical_function_also_of_virtual_ones_that_come_later(make: Make, tree: Tree) -> None:
    tree.add(FakeFunction(address="0000:01:00.0", total_vfs=4))
    scanner = make(str(tree.root))
    scanner.scan()
    tree.add(FakeFunction(address="0000:01:10.0", physfn="0000:01:00.0"))
    _, _, new = scanner.look()
    assert [row[9] for row in new] == ["0000:01:00.0"]
    assert [row[9] for row in scanner.scan()] == [None, "0000:01:00.0"]


def test_more_makers_of_virtual_functions_than_are_remembered(tree: Tree) -> None:
    _pciscan_c = pytest.importorskip("hypeman._native._pciscan_c")
    tree.add_all(FakeFunction(address=f"0000:{n:02x}:00.0", vendor=n + 1, total_vfs=4) for n in range(40))
    tree.add(FakeFunction(address="0000:40:00.0", vendor=39, physfn="0000:26:00.0"))
    tree.add(FakeFunction(address="0000:40:01.0", vendor=999, physfn="0000:26:00.0"))
    rows = _pciscan_c.Scanner(str(tree.root)).scan()
    assert rows == pciscan_py.Scanner(str(tree.root)).scan()
    assert [row[9] for row in rows[-2:]] == ["0000:26:00.0"] * 2


def test_random_histories_look_the_same_to_both(tree: Tree) -> None:
    """After any change, the differences that look() reports turn the old picture into what a new scan sees."""
    _pciscan_c = pytest.importorskip("hypeman._native._pciscan_c")
    rng = random.Random(20)
    tree.add_all(server(60))
    scanners = [_pciscan_c.Scanner(str(tree.root)), pciscan_py.Scanner(str(tree.root))]
    first, second = (scanner.scan() for scanner in scanners)
    assert first == second
    picture = {row[0]: row for row in first}
    for turn in range(80):
        for _ in range(rng.randrange(3)):
            address = rng.choice(sorted(picture))
            fresh = f"{0x100 + turn:04x}:00:00.{rng.randrange(8)}"
            action = rng.choice(("driver", "remove", "add"))
            if action == "add" and not tree.path(fresh).exists():
                tree.add(FakeFunction(address=fresh, group=None))
            elif action == "driver" and tree.path(address).exists():
                tree.set_driver(address, rng.choice((None, "vfio-pci")))
            elif action == "remove" and tree.path(address).exists():
                tree.remove(address)
        answers = [scanner.look() for scanner in scanners]
        assert answers[0] == answers[1]
        changed, gone, new = answers[0]
        for address in gone:
            del picture[address]
        for address, driver in changed:
            row = picture[address]
            picture[address] = (*row[:6], driver, *row[7:])
        picture |= {row[0]: row for row in new}
        assert [picture[address] for address in sorted(picture)] == pciscan_py.Scanner(str(tree.root)).scan()
