"""Registering, claiming, binding and giving back, on a made-up machine."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec import UNSET

from hypeman.config import DevicesConfig
from hypeman.devices.registry import BINDINGS, DEVICES, VGPUS
from hypeman.devices.service import Devices
from hypeman.devices.types import CreateDeviceRequest, Device
from hypeman.errors import Conflict, InsufficientResources, InUse, InvalidRequest, NotFound
from hypeman.events.log import read_after
from hypeman.host.files import HostError
from hypeman.host.sysfs import HostStuck
from hypeman.store import Store
from tests.devices.kernel import add_mdev_parent, add_vendor_vgpu, render
from tests.devices.machine import AUDIO, DISK, GPU, NIC, PORT, SPARE, Machine
from tests.devices.trees import FakeFunction


async def register(devices: Devices, address: str, name: str | None = None, **tags: str) -> Device:
    return await devices.register(CreateDeviceRequest(pci_address=address, name=name, tags=tags))


async def claim(store: Store, devices: Devices, instance: str, *refs: str, gpu: str = "") -> tuple[str, ...]:
    return await store.write(lambda txn: devices.claim(txn, instance, refs, gpu))


async def release(store: Store, devices: Devices, instance: str) -> None:
    await store.write(lambda txn: devices.release(txn, instance))


def bindings(store: Store) -> list[str]:
    return store.read(lambda txn: list(txn.keys(BINDINGS)))


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


# The registry


async def test_registers_and_shows_a_device(devices: Devices) -> None:
    device = await register(devices, GPU.upper(), "l4", team="a")
    assert (device.type, device.pci_address, device.vendor_id, device.device_id) == ("gpu", GPU, "10de", "20b5")
    assert (device.iommu_group, device.bound_to_vfio, device.attached_to) == (2, False, None)
    assert device.tags == {"team": "a"}
    assert devices.get("l4") == devices.get(device.id) == device
    assert devices.list() == (device,)
    assert devices.list({"team": "a"}) == (device,)
    assert devices.list({"team": "b"}) == ()
    await devices.delete("l4")
    assert devices.list() == ()
    with pytest.raises(NotFound) as error:
        devices.get("l4")
    assert error.value.code == "not_found"


async def test_names_default_to_the_address(devices: Devices) -> None:
    assert (await register(devices, NIC)).name == "pci-0000-02-00-0"


async def test_addresses_and_names_are_unique(devices: Devices) -> None:
    await register(devices, NIC, "nic")
    for address, name in ((NIC, "other"), (GPU, "nic")):
        with pytest.raises(Conflict) as error:
            await register(devices, address, name)
        assert error.value.code == "conflict"


@pytest.mark.parametrize(
    ("address", "name", "wrong", "code"),
    [
        ("02:00.0", None, InvalidRequest, "invalid_pci_address"),
        (NIC, "-", InvalidRequest, "invalid_name"),
        ("0000:0f:00.0", None, NotFound, "device_not_found"),
        (PORT, None, Conflict, "conflict"),
    ],
)
async def test_refusals(devices: Devices, address: str, name: str, wrong: type[Exception], code: str) -> None:
    with pytest.raises(wrong) as error:
        await register(devices, address, name)
    assert error.value.code == code  # type: ignore[attr-defined]


async def test_what_the_host_needs_is_refused(machine: Machine, devices: Devices) -> None:
    block = machine.tree.path(DISK) / "nvme/nvme0/nvme0n1"
    block.mkdir(parents=True)
    (machine.tree.root / "dev/block/259:0").symlink_to(block)
    (machine.proc / "self").mkdir()
    (machine.proc / "self/mountinfo").write_text("22 1 259:0 / / rw - ext4 /dev/root rw\n")
    with pytest.raises(Conflict, match="holds /"):
        await register(devices, DISK)


async def test_available_lists_what_can_be_passed_and_why_the_rest_cannot(devices: Devices) -> None:
    assert [device.pci_address for device in await devices.available()] == [GPU, AUDIO, NIC, DISK, SPARE]
    everything = {device.pci_address: device for device in await devices.available(everything=True)}
    assert everything[PORT].reason == "is a bridge"
    assert everything[NIC].current_driver == "e1000e"
    assert everything[SPARE].current_driver is None


async def test_a_device_in_use_cannot_be_deleted(store: Store, devices: Devices) -> None:
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    assert devices.get("nic").attached_to == "one"
    with pytest.raises(InUse) as error:
        await devices.delete("nic")
    assert error.value.code == "in_use"
    await release(store, devices, "one")
    await devices.delete("nic")


# Claims


async def test_claims_by_id_or_name_in_the_order_asked_for(store: Store, devices: Devices) -> None:
    gpu, nic = await register(devices, GPU, "gpu"), await register(devices, NIC, "nic")
    assert await claim(store, devices, "one", "nic", gpu.id) == (nic.id, gpu.id)
    assert [path[-12:] for path in devices.sysfs_paths("one")] == [NIC, GPU]
    assert devices.sysfs_paths("two") == ()


async def test_impossible_claims_are_refused(store: Store, devices: Devices) -> None:
    await register(devices, NIC, "nic")
    with pytest.raises(NotFound) as error:
        await claim(store, devices, "one", "nic", "no")
    assert error.value.code == "device_not_found"
    assert devices.get("nic").attached_to is None, "a refused claim took a device"
    with pytest.raises(InvalidRequest):
        await claim(store, devices, "one", "nic", "nic")
    await claim(store, devices, "one", "nic")
    with pytest.raises(InUse):
        await claim(store, devices, "two", "nic")


async def test_a_group_goes_to_one_instance(store: Store, devices: Devices) -> None:
    await register(devices, GPU, "gpu")
    await register(devices, AUDIO, "audio")
    await claim(store, devices, "one", "gpu")
    with pytest.raises(InUse, match="shares IOMMU group 2 with gpu"):
        await claim(store, devices, "two", "audio")
    await release(store, devices, "one")
    await claim(store, devices, "two", "audio", "gpu")


# Binding


async def test_a_gpu_and_its_audio_move_together_and_come_back(
    machine: Machine, store: Store, devices: Devices
) -> None:
    before = render(machine.tree)
    await register(devices, GPU, "gpu")
    await claim(store, devices, "one", "gpu")
    await devices.bind("one", uid=1234, gid=1234)
    assert {devices._pci.driver(a) for a in (GPU, AUDIO)} == {"vfio-pci"}
    assert devices._pci.driver(PORT) == "pcieport"
    assert devices.get("gpu").bound_to_vfio
    node = (machine.root / "dev/vfio/2").stat()
    assert (node.st_uid, stat.S_IMODE(node.st_mode)) == (1234, 0o600)
    writes = len(machine.kernel.writes)
    await devices.bind("one")
    assert len(machine.kernel.writes) == writes, "a second bind changed something"
    await devices.unbind("one")
    assert render(machine.tree) == before
    assert not bindings(store)
    await devices.unbind("one")
    await release(store, devices, "one")
    assert devices.get("gpu").attached_to is None


async def test_a_function_without_a_driver_or_with_an_override_gets_that_back(
    machine: Machine, store: Store, devices: Devices
) -> None:
    (machine.tree.path(NIC) / "driver_override").write_text("e1000e\n")
    before = render(machine.tree)
    await register(devices, SPARE, "spare")
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "spare", "nic")
    await devices.bind("one")
    assert render(machine.tree) != before
    await devices.unbind("one")
    assert render(machine.tree) == before


async def test_what_was_on_vfio_before_us_stays_there(machine: Machine, store: Store, devices: Devices) -> None:
    machine.tree.set_driver(NIC, "vfio-pci")
    (machine.root / "dev/vfio/3").touch()
    before = render(machine.tree)
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    await devices.bind("one")
    await devices.unbind("one")
    assert render(machine.tree) == before


async def test_the_journal_is_stored_before_the_first_write(machine: Machine, store: Store, devices: Devices) -> None:
    await register(devices, GPU, "gpu")
    await claim(store, devices, "one", "gpu")
    seen: list[list[str]] = []
    act = machine.kernel._act
    machine.kernel._act = lambda path, text: (seen.append(bindings(store)), act(path, text))  # type: ignore[method-assign,func-returns-value,assignment]
    await devices.bind("one")
    assert seen[0] == [GPU, AUDIO]


async def count_writes(store: Store, devices: Devices, machine: Machine) -> int:
    """Of one bind of the GPU's group."""
    await devices.bind("one")
    count = len(machine.kernel.writes)
    await devices.unbind("one")
    machine.kernel.writes.clear()
    return count


async def test_a_bind_that_fails_at_any_write_leaves_all_as_it_was(
    machine: Machine, store: Store, devices: Devices
) -> None:
    await register(devices, GPU, "gpu")
    await claim(store, devices, "one", "gpu")
    before = render(machine.tree)
    count = await count_writes(store, devices, machine)
    assert count >= 6
    failures = 0
    for number in range(count):
        machine.kernel.writes.clear()
        machine.kernel.refuse = {number: errno.EBUSY}
        try:
            await devices.bind("one")
        except HostError:
            failures += 1
        else:
            await devices.unbind("one")  # the second way of binding worked
        machine.kernel.refuse = {}
        assert render(machine.tree) == before, f"write {number}"
        assert not bindings(store), f"write {number}"
    assert failures >= 4


async def test_a_bind_cancelled_at_any_write_leaves_all_as_it_was(
    machine: Machine, store: Store, devices: Devices
) -> None:
    await register(devices, GPU, "gpu")
    await claim(store, devices, "one", "gpu")
    before = render(machine.tree)
    count = await count_writes(store, devices, machine)
    act = machine.kernel._act
    token = trio.lowlevel.current_trio_token()
    stopped = 0
    for number in range(count):
        machine.kernel.writes.clear()
        with trio.CancelScope() as scope:

            def cancelling(path: list[str], text: str, number: int = number, scope: trio.CancelScope = scope) -> None:
                if len(machine.kernel.writes) == number + 1:
                    token.run_sync_soon(scope.cancel)
                act(path, text)

            machine.kernel._act = cancelling  # type: ignore[method-assign]
            await devices.bind("one")
        machine.kernel._act = act  # type: ignore[method-assign]
        stopped += scope.cancelled_caught
        if not scope.cancelled_caught:  # it came too late: everything is bound
            await devices.unbind("one")
        assert render(machine.tree) == before, f"write {number}"
        assert not bindings(store), f"write {number}"
    assert stopped >= count - 1


async def test_a_driver_that_never_unbinds_does_not_hang_the_server(
    tree_root: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The bind fails when time is up, the device stays ours to give back, and is when the kernel returns."""
    machine = Machine(tree_root, deadline=0.2)
    devices = machine.service(store)
    before = render(machine.tree)
    gate = machine.kernel.gates["e1000e/unbind"] = threading.Event()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(devices.run)
            await register(devices, NIC, "nic")
            await register(devices, GPU, "gpu")
            await claim(store, devices, "one", "nic")
            await claim(store, devices, "two", "gpu")
            with pytest.raises(HostStuck):
                await devices.bind("one")
            assert "has not returned" in caplog.text
            await devices.bind("two")  # others go on
            with pytest.raises(InUse, match=f"attached to instance one.*{NIC}.*e1000e/unbind"):
                await devices.delete("nic")
            await release(store, devices, "one")
            assert bindings(store) == [GPU, AUDIO, NIC]
            with pytest.raises(InUse, match="still being given back"):
                await claim(store, devices, "three", "nic")
            for _ in range(2):  # a later attempt says what went wrong first, and not that something is under way
                with pytest.raises(InUse, match=f"given back by instance one.*{NIC}.*e1000e/unbind"):
                    await devices.delete("nic")
                with pytest.raises(HostStuck, match=f"PCI function {NIC} .*e1000e/unbind has not returned"):
                    await devices.unbind("one")
            await devices.unbind("two")
            gate.set()
            await until(lambda: not bindings(store))
            assert render(machine.tree) == before
            await claim(store, devices, "three", "nic")
            nursery.cancel_scope.cancel()
    finally:
        gate.set()


async def test_a_device_unplugged_while_registered(machine: Machine, store: Store, devices: Devices) -> None:
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    machine.tree.remove(NIC)
    with pytest.raises(Conflict, match=f"device nic .{NIC}. is missing"):
        await devices.bind("one")
    assert not devices.get("nic").bound_to_vfio
    assert devices.get("nic").missing is True
    await release(store, devices, "one")
    await devices.delete("nic")


async def test_a_device_that_vanishes_from_a_running_guest_is_reported_once(
    machine: Machine, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    journal: list[tuple[str, str]] = []
    devices = machine.service(store)
    devices.on_vanished(lambda instance, text: journal.append((instance, text)))
    devices.look_every = 0.01
    looks = 0
    exists = devices._pci.exists

    def counted(address: str) -> bool:
        nonlocal looks
        looks += 1
        return exists(address)

    async def several_looks() -> None:
        with trio.fail_after(60):
            enough = looks + 3
            while looks < enough:
                await trio.sleep(0.01)

    devices._pci.exists = counted  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        await nursery.start(devices.run)
        await register(devices, NIC, "nic")
        await claim(store, devices, "one", "nic")
        await devices.bind("one")
        await several_looks()
        assert (journal, devices.get("nic").missing) == ([], UNSET)
        machine.tree.remove(NIC)
        await several_looks()
        [(instance, text)] = journal
        assert (instance, NIC in text, "vanished" in text) == ("one", True, True)
        assert NIC in caplog.text
        assert devices.list()[0].missing is True
        await several_looks()
        assert len(journal) == 1
        (event,) = [event for event in store.read(partial(read_after, cursor=0, limit=99)) if "vanished" in event.type]
        assert (event.type, event.object.name, event.instance_id) == ("device.vanished", "nic", "one")
        assert event.data == {"pci_address": NIC}
        await devices.unbind("one")
        nursery.cancel_scope.cancel()


async def test_a_stopped_instance_keeps_its_device(store: Store, devices: Devices) -> None:
    """By design: a start never fails because another instance took the device in between. See README.md."""
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    await devices.bind("one")
    await devices.unbind("one")
    assert devices.get("nic").attached_to == "one"
    with pytest.raises(InUse, match="attached to instance one"):
        await claim(store, devices, "two", "nic")


async def test_a_device_unplugged_while_bound_can_be_given_back(
    machine: Machine, store: Store, devices: Devices
) -> None:
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    await devices.bind("one")
    machine.tree.remove(NIC)
    await devices.unbind("one")
    assert not bindings(store)


async def test_another_device_at_the_same_address_is_not_passed(
    machine: Machine, store: Store, devices: Devices
) -> None:
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    machine.tree.remove(NIC)
    await devices.prepare()
    machine.tree.add(FakeFunction(address=NIC, device=0x9999, group=3))
    with pytest.raises(Conflict, match="9999"):
        await devices.bind("one")


async def test_a_group_that_became_the_hosts_is_not_passed(machine: Machine, store: Store, devices: Devices) -> None:
    await register(devices, GPU, "gpu")
    await claim(store, devices, "one", "gpu")
    (machine.tree.root / "class/net/eth9").symlink_to(machine.tree.path(AUDIO))
    (machine.proc / "net").mkdir()
    (machine.proc / "net/route").write_text("Iface\neth9 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0\n")
    with pytest.raises(Conflict, match="default route"):
        await devices.bind("one")


async def test_a_stranger_in_the_group_stops_it(machine: Machine, store: Store, devices: Devices) -> None:
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    (machine.tree.root / "kernel/iommu_groups/3/devices/platform-dma").touch()
    with pytest.raises(Conflict, match="platform-dma"):
        await devices.bind("one")


async def test_the_persistence_daemon_releases_one_gpu_only(
    machine: Machine, store: Store, devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.tree.set_driver(GPU, "nvidia")
    machine.kernel.natives[GPU] = "nvidia"
    calls = tmp_path / "calls"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *query*) echo Enabled;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    await register(devices, GPU, "gpu")
    await claim(store, devices, "one", "gpu")
    await devices.bind("one")
    await devices.unbind("one")
    assert calls.read_text().splitlines() == [
        f"-i {GPU} --query-gpu=persistence_mode --format=csv,noheader",
        f"-i {GPU} -pm 0",
        f"-i {GPU} -pm 1",
    ]


# After a restart


async def test_a_restart_keeps_what_an_instance_has_and_gives_back_the_rest(
    machine: Machine, store: Store, devices: Devices
) -> None:
    await register(devices, NIC, "nic")
    await register(devices, GPU, "gpu")
    await claim(store, devices, "living", "nic")
    await claim(store, devices, "ended", "gpu")
    await devices.bind("living")
    await devices.bind("ended")
    await release(store, devices, "ended")  # as if killed before its unbind
    async with trio.open_nursery() as nursery:
        await nursery.start(machine.service(store).run)
        nursery.cancel_scope.cancel()
    assert bindings(store) == [NIC]
    assert devices.get("nic").bound_to_vfio
    assert devices._pci.driver(GPU) == "nouveau"
    assert devices._pci.driver(AUDIO) == "snd_hda_intel"


async def test_after_a_boot_of_the_host_nothing_is_given_back_and_a_bind_starts_anew(
    machine: Machine, store: Store, devices: Devices
) -> None:
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic")
    await devices.bind("one")
    machine.tree.set_driver(NIC, "e1000e")
    (machine.tree.path(NIC) / "driver_override").write_text("(null)\n")
    before = render(machine.tree)
    (machine.proc / "sys/kernel/random/boot_id").write_text("boot-two\n")
    machine.kernel.writes.clear()
    again = machine.service(store)
    await again.unbind("one")
    assert machine.kernel.writes == []
    await again.bind("one")
    await again.unbind("one")
    assert render(machine.tree) == before


# vGPUs


@pytest.fixture
async def with_mdev(machine: Machine, devices: Devices) -> Devices:
    types = {"nvidia-63": ("GRID T4-1Q", "num_heads=4, framebuffer=1024M", 2), "nvidia-64": ("GRID T4-2Q", "", 1)}
    add_mdev_parent(machine.tree, GPU, types)
    await devices.prepare()
    return devices


async def test_a_vgpu_is_made_and_removed_with_its_instance(machine: Machine, store: Store, with_mdev: Devices) -> None:
    devices = with_mdev
    await claim(store, devices, "one", gpu="T4-1Q")
    uuid = devices.mdev_uuid("one")
    assert devices.sysfs_paths("one") == (f"{machine.tree.root}/bus/mdev/devices/{uuid}",)
    before = render(machine.tree)
    await devices.bind("one")
    await devices.bind("one")
    assert f"mdev {uuid}" in render(machine.tree)
    status = await devices.gpu_status()
    assert status is not None
    assert (status.mode, status.total_slots, status.used_slots) == ("vgpu", 2, 1)
    assert status.profiles is not UNSET
    reported = [(profile.name, profile.framebuffer_mb, profile.available) for profile in status.profiles]
    assert reported == [("T4-1Q", 1024, 1), ("T4-2Q", 2048, 1)]
    await devices.unbind("one")
    assert render(machine.tree) == before
    await release(store, devices, "one")
    assert not store.read(lambda txn: list(txn.keys(VGPUS)))


async def test_slots_run_out(store: Store, with_mdev: Devices) -> None:
    for instance in ("one", "two"):
        await claim(store, with_mdev, instance, gpu="T4-1Q")
        await with_mdev.bind(instance)
    with pytest.raises(InsufficientResources):
        await claim(store, with_mdev, "three", gpu="T4-1Q")
    await with_mdev.unbind("one")
    await release(store, with_mdev, "one")
    await claim(store, with_mdev, "three", gpu="T4-1Q")


async def test_an_unknown_profile_is_refused(store: Store, with_mdev: Devices) -> None:
    with pytest.raises(InvalidRequest, match="T4-1Q, T4-2Q"):
        await claim(store, with_mdev, "one", gpu="A16-1Q")


async def test_a_card_with_vgpus_is_not_passed_whole(store: Store, with_mdev: Devices) -> None:
    await claim(store, with_mdev, "one", gpu="T4-1Q")
    await with_mdev.bind("one")
    with pytest.raises(Conflict, match="vGPU"):
        await register(with_mdev, GPU)


async def test_a_vgpu_the_driver_refuses_takes_the_functions_back_too(
    machine: Machine, store: Store, with_mdev: Devices
) -> None:
    devices = with_mdev
    await register(devices, NIC, "nic")
    await claim(store, devices, "one", "nic", gpu="T4-2Q")
    before = render(machine.tree)
    (machine.tree.path(GPU) / "mdev_supported_types/nvidia-64/available_instances").write_text("0\n")
    with pytest.raises(HostError, match="No space left"):
        await devices.bind("one")
    assert render(machine.tree) == before


CREATABLE = "ID    : vGPU Name\n1428 : NVIDIA H200X-141C\n1414 : NVIDIA H200X-1-18C\n"
VF = "0000:01:00.4"


@pytest.fixture
async def with_vendor(tree_root: Path, store: Store) -> tuple[Machine, Devices]:
    machine = Machine(tree_root, deadline=0.3)
    machine.tree.add(FakeFunction(address=VF, vendor=0x10DE, device=0x20B5, driver="nvidia", physfn=GPU, group=9))
    add_vendor_vgpu(machine.tree, VF, CREATABLE)
    devices = machine.service(store)
    await devices.prepare()
    return machine, devices


async def test_the_vendor_kind_writes_the_type_into_the_function(
    with_vendor: tuple[Machine, Devices], store: Store
) -> None:
    machine, devices = with_vendor
    (machine.root / "dev/vfio/9").touch()
    await claim(store, devices, "one", gpu="H200X-1-18C")
    assert devices.sysfs_paths("one")[0].endswith(VF)
    await devices.bind("one", uid=77, gid=77)
    assert "vgpu=1414" in render(machine.tree)
    assert (machine.root / "dev/vfio/9").stat().st_uid == 77
    with pytest.raises(InsufficientResources):
        await claim(store, devices, "two", gpu="1428")
    await devices.unbind("one")
    assert "vgpu=0" in render(machine.tree)
    assert (machine.root / "dev/vfio/9").stat().st_uid == 0
    with pytest.raises(InsufficientResources):  # stopped, but the slot is still its
        await claim(store, devices, "two", gpu="1428")
    await release(store, devices, "one")
    await claim(store, devices, "two", gpu="1428")


async def test_a_late_release_never_clears_the_next_owners_type(
    with_vendor: tuple[Machine, Devices], store: Store
) -> None:
    machine, devices = with_vendor
    (machine.root / "dev/vfio/9").touch()
    await claim(store, devices, "one", gpu="H200X-141C")
    await devices.bind("one")
    gate = machine.kernel.gates["current_vgpu_type"] = threading.Event()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(devices.run)
            with pytest.raises(HostStuck):
                await devices.unbind("one")
            await release(store, devices, "one")
            (machine.tree.path(VF) / "nvidia/current_vgpu_type").write_text("0\n")  # done, but not returned
            await devices.prepare()
            with pytest.raises(InsufficientResources):
                await claim(store, devices, "two", gpu="H200X-141C")
            gate.set()
            await until(lambda: not store.read(lambda txn: list(txn.keys(VGPUS))))
            await devices.prepare()
            await claim(store, devices, "two", gpu="H200X-141C")
            await devices.bind("two")
            assert "vgpu=1428" in render(machine.tree)
            nursery.cancel_scope.cancel()
    finally:
        gate.set()


async def test_a_type_that_others_set_is_neither_taken_nor_cleared(
    with_vendor: tuple[Machine, Devices], store: Store
) -> None:
    machine, devices = with_vendor
    await claim(store, devices, "one", gpu="H200X-141C")
    (machine.tree.path(VF) / "nvidia/current_vgpu_type").write_text("1414\n")
    with pytest.raises(HostError, match="not ours"):
        await devices.bind("one")
    assert "vgpu=1414" in render(machine.tree)


async def test_the_cards_are_reported_where_there_are_no_vgpus(store: Store, devices: Devices) -> None:
    status = await devices.gpu_status()
    assert status is not None
    assert (status.mode, status.total_slots, status.used_slots) == ("passthrough", 1, 0)
    await register(devices, GPU, "gpu")
    await claim(store, devices, "one", "gpu")
    status = await devices.gpu_status()
    assert status is not None and status.devices is not UNSET
    assert (status.used_slots, [d.available for d in status.devices]) == (1, [False])


async def test_a_machine_without_pci(store: Store, tree_root: Path) -> None:
    devices = Devices(store, DevicesConfig(sysfs_root=str(tree_root / "none"), dev_root=str(tree_root)))
    assert await devices.available() == ()
    assert await devices.gpu_status() is None
    with pytest.raises(NotFound):
        await register(devices, NIC)
    assert not store.read(lambda txn: list(txn.keys(DEVICES)))
