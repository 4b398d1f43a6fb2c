"""Profiles and slots."""

from __future__ import annotations

import pytest

from hypeman.devices.types import VgpuKind, VgpuParent, VgpuRecord, VgpuType
from hypeman.devices.vgpu import choose, parse_creatable, parse_framebuffer, profile_name, profiles, slots
from hypeman.errors import InsufficientResources, InvalidRequest


def parent(address: str, available: int, *made: str, gpu: str = "", kind: VgpuKind = VgpuKind.MDEV) -> VgpuParent:
    types = (VgpuType("nvidia-1", "L40S-1Q", 1024, available), VgpuType("nvidia-2", "L40S-2Q", 2048, available // 2))
    return VgpuParent(address, gpu or address, kind, types, made)


def claim(parent: str, uuid: str = "u", *, instance: str = "i", leaving: bool = False) -> VgpuRecord:
    return VgpuRecord(
        instance_id=instance, uuid=uuid, profile="L40S-1Q", type_id="nvidia-1", parent=parent, kind=VgpuKind.MDEV,
        leaving=leaving,
    )  # fmt: skip


def test_names_and_sizes() -> None:
    assert [profile_name(n) for n in ("NVIDIA L40S-1Q", "GRID T4-1B", "vga")] == ["L40S-1Q", "T4-1B", "vga"]
    assert parse_framebuffer("x", "num_heads=4, framebuffer=512M, max=1") == 512
    sizes = {"L40S-2Q": 2048, "M10-0B": 512, "H200X-1-18C": 18432, "A100-1-5CME": 5120, "vga": 0}
    assert {name: parse_framebuffer(name) for name in sizes} == sizes


def test_creatable_types_of_the_vendor_kind() -> None:
    text = "ID    : vGPU Name\n1428 : NVIDIA H200X-141C\n1414 :  NVIDIA H200X-1-18C\nrubbish\n : \n"
    assert [(t.id, t.name, t.framebuffer_mb) for t in parse_creatable(text)] == [
        ("1428", "H200X-141C", 141 * 1024), ("1414", "H200X-1-18C", 18 * 1024),
    ]  # fmt: skip
    assert parse_creatable("") == ()


def test_the_card_with_the_fewest_gets_the_next() -> None:
    parents = [parent("0000:01:00.4", 1, gpu="0000:01:00.0"), parent("0000:01:00.5", 0, "x", gpu="0000:01:00.0"),
               parent("0000:02:00.4", 1, gpu="0000:02:00.0")]  # fmt: skip
    assert choose(parents, [], "L40S-1Q")[0].address == "0000:02:00.4"
    assert choose(parents, [claim("0000:02:00.4")], "L40S-1Q")[0].address == "0000:01:00.4"


def test_claims_that_are_not_made_yet_take_their_slot() -> None:
    parents = [parent("0000:01:00.0", 2)]
    assert choose(parents, [claim("0000:01:00.0", "a")], "nvidia-1")
    with pytest.raises(InsufficientResources):
        choose(parents, [claim("0000:01:00.0", "a"), claim("0000:01:00.0", "b")], "L40S-1Q")


def test_made_ones_are_counted_once() -> None:
    parents = [parent("0000:01:00.0", 1, "a")]
    assert choose(parents, [claim("0000:01:00.0", "a")], "L40S-1Q")
    assert slots(parents, [claim("0000:01:00.0", "a")]) == (2, 1)


def test_unknown_profiles_are_refused_with_what_there_is() -> None:
    with pytest.raises(InvalidRequest, match="known profiles: L40S-1Q, L40S-2Q"):
        choose([parent("0000:01:00.0", 2)], [], "A16-1Q")
    with pytest.raises(InvalidRequest, match="known profiles: none"):
        choose([], [], "A16-1Q")


def test_a_vendor_slot_that_is_leaving_is_not_free() -> None:
    """Nor is one with a type that is not ours, or one whose type is already cleared but not yet confirmed."""
    vendor = VgpuKind.VENDOR
    for made, claims in ((("1428",), []), ((), [claim("0000:01:00.4", leaving=True)])):
        parents = [parent("0000:01:00.4", 1, *made, kind=vendor)]
        with pytest.raises(InsufficientResources):
            choose(parents, claims, "L40S-1Q")
        assert slots(parents, claims) == (1, 1)


def test_slots_and_profiles() -> None:
    parents = [parent("0000:01:00.0", 4, "x"), parent("0000:02:00.0", 2)]
    assert slots(parents, []) == (7, 1)
    assert profiles(parents, []) == [("L40S-1Q", 1024, 6), ("L40S-2Q", 2048, 3)]
    assert profiles(parents, [claim("0000:02:00.0")]) == [("L40S-1Q", 1024, 5), ("L40S-2Q", 2048, 2)]
