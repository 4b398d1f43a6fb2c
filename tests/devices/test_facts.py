"""Why functions can or cannot be passed through."""

from __future__ import annotations

import pytest

from hypeman.devices.facts import check_device_name, default_name, endpoints, obstacles, parse_address
from hypeman.devices.types import DeviceType, PciFunction
from hypeman.errors import InvalidRequest

BRIDGE, VGA, SOUND, NIC = 0x060400, 0x030000, 0x040300, 0x020000


def function(address: str, group: int, class_code: int = NIC, driver: str | None = "d", **more: object) -> PciFunction:
    fields = {"numa_node": -1, "physfn": None, "total_vfs": 0, "reset_methods": "flr", **more}
    return PciFunction(address, 1, 2, class_code, 0, 0, driver, group, **fields)  # type: ignore[arg-type]


def all_of(*functions: PciFunction) -> dict[str, PciFunction]:
    return {f.address: f for f in functions}


def test_a_lone_endpoint_is_free() -> None:
    assert obstacles(all_of(function("0000:01:00.0", 1)), {}, ()) == {}


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (function("0000:01:00.0", 1, BRIDGE, "pcieport"), "is a bridge"),
        (function("0000:01:00.0", -1), "has no IOMMU group"),
        (function("10000:01:00.0", 1), "is in a domain above ffff"),
    ],
)
def test_obstacles_of_its_own(f: PciFunction, reason: str) -> None:
    assert obstacles(all_of(f), {}, ())[f.address].startswith(reason)


def test_what_the_host_holds_blocks_its_group_but_not_others() -> None:
    functions = all_of(function("0000:01:00.0", 1), function("0000:01:00.1", 1), function("0000:02:00.0", 2))
    assert obstacles(functions, {"0000:01:00.0": "holds /"}, ()) == {
        "0000:01:00.0": "in use by the host: holds /",
        "0000:01:00.1": "shares IOMMU group 1 with 0000:01:00.0, in use by the host: holds /",
    }


@pytest.mark.parametrize(("driver", "blocks"), [(None, False), ("pcieport", False), ("vfio-pci", False), ("lpc", True)])
def test_a_bridge_blocks_its_group_only_with_a_driver_of_its_own(driver: str | None, blocks: bool) -> None:
    functions = all_of(function("0000:00:1f.0", 1, 0x060100, driver), function("0000:00:1f.2", 1))
    assert ("0000:00:1f.2" in obstacles(functions, {}, ())) is blocks


def test_a_held_bridge_blocks_what_is_in_its_group() -> None:
    """The uplink behind a bridge names the bridge too; who shares the bridge's group is not free."""
    functions = all_of(function("0000:00:01.0", 1, BRIDGE, "pcieport"), function("0000:01:00.0", 1))
    held = {"0000:00:01.0": "carries the default route (eth0)"}
    assert "0000:01:00.0" in obstacles(functions, held, ())


def test_physical_functions_with_virtual_ones_are_not_free_their_virtual_ones_are() -> None:
    virtual = function("0000:01:00.1", 2, physfn="0000:01:00.0")
    found = obstacles(all_of(function("0000:01:00.0", 1, total_vfs=4), virtual), {}, ())
    assert list(found) == ["0000:01:00.0"]
    assert "has virtual functions" in found["0000:01:00.0"]
    assert obstacles(all_of(function("0000:01:00.0", 1, total_vfs=4)), {}, ()) == {}


def test_parents_of_vgpus_are_not_free() -> None:
    assert "vGPU" in obstacles(all_of(function("0000:01:00.0", 1)), {}, ["0000:01:00.0"])["0000:01:00.0"]


def test_functions_without_a_group_do_not_block_each_other() -> None:
    functions = all_of(function("0000:01:00.0", -1), function("0000:02:00.0", -1))
    assert all(reason.startswith("has no IOMMU") for reason in obstacles(functions, {}, ()).values())


def test_endpoints_are_the_group_without_its_bridges() -> None:
    functions = all_of(function("0000:00:01.0", 1, BRIDGE), function("0000:01:00.0", 1), function("0000:02:00.0", 2))
    assert [f.address for f in endpoints(functions, 1)] == ["0000:01:00.0"]


@pytest.mark.parametrize(("code", "kind"), [(VGA, "gpu"), (0x030200, "gpu"), (0x038000, "pci"), (NIC, "pci")])
def test_gpus_are_vga_and_3d_controllers(code: int, kind: str) -> None:
    assert function("0000:01:00.0", 1, code).type is DeviceType(kind)


def test_addresses() -> None:
    assert parse_address("0000:A2:00.0") == "0000:a2:00.0"
    for text in ("", "a2:00.0", "0000:a2:00.8", "0000:a2:00.0\n", "0000:a2:00.00", "x000:a2:00.0", "10000:a2:00.0"):
        with pytest.raises(InvalidRequest) as error:
            parse_address(text)
        assert error.value.code == "invalid_pci_address"


def test_names() -> None:
    assert check_device_name("L4_gpu.1-a") == "L4_gpu.1-a"
    assert check_device_name(default_name("0000:a2:00.0")) == "pci-0000-a2-00-0"
    for name in ("", "a", "-ab", "a b", "a\n", "ä" * 3, "a" * 129, "ab/c"):
        with pytest.raises(InvalidRequest) as error:
            check_device_name(name)
        assert error.value.code == "invalid_name"
