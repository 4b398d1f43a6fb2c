"""What a pod of one namespace cannot reach of another's, whatever it claims about itself."""

from __future__ import annotations

import msgspec
import pytest
import trio
from trio.testing import MockClock

from hypeman.kube import names
from hypeman.kube.api import ApiClient
from hypeman.kube.credentials import Access
from hypeman.kube.decide import Owner
from hypeman.kube.owners import Owners
from hypeman.kube.types import OwnerReference
from tests.kube.test_node import claim
from tests.kube.world import SANDBOX, SANDBOX_PATH, World, pod

OTHER = "/api/v1/namespaces/other/pods"


@pytest.fixture
def world() -> World:
    return World()


async def test_memory_is_not_adopted_from_another_namespace(world: World, autojump_clock: MockClock) -> None:
    """Anyone who may create pods can write any owner's uid into them."""
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    mine, theirs = world.add_pod("box", owner=SANDBOX), f"{OTHER}/box"
    async with world.running():
        await world.until(lambda: world.phase(mine) == "Running")
        (saved,) = world.host.instances
        world.cluster.delete_pod(mine)
        await world.until(lambda: world.phase(mine) == "gone")
        for image in ("nginx:alpine", "nginx:2"):  # the first would adopt it, the second discard it
            world.cluster.put(theirs, pod(owner=SANDBOX, container={"image": image}))
            await world.until(lambda: world.phase(theirs) == "Running")
            assert world.host.instances[saved]["state"] == "Standby"
            world.cluster.delete_pod(theirs)
            await world.until(lambda: world.phase(theirs) == "gone")
        await trio.sleep(60)
        assert list(world.host.instances) == [saved]


async def test_an_owner_under_a_wrong_name_is_another_owner(world: World) -> None:
    """That it is gone says nothing of the real one, whose saved memory would be deleted."""
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    owners = Owners(ApiClient(Access(server="http://cluster"), world.cluster))
    real = OwnerReference(
        api_version="agents.x-k8s.io/v1alpha1", kind="Sandbox", name="box", uid="sandbox-1", controller=True
    )
    assert await owners.look(msgspec.structs.replace(real, name="none"), "default") is Owner.GONE
    assert await owners.look(real, "other") is Owner.GONE
    assert await owners.look(real, "default") is Owner.ALIVE


async def test_a_fork_is_of_its_own_namespaces_memory(world: World, autojump_clock: MockClock) -> None:
    """Which holds the values of Secrets that the other namespace's pods only name."""
    golden = {names.GOLDEN: "true"}
    mine, theirs = world.add_pod("warm", annotations=golden), f"{OTHER}/warm"
    async with world.running():
        await world.until(lambda: world.phase(mine) == "Running")
        world.cluster.put(theirs, pod(annotations=golden))
        await world.until(lambda: world.phase(theirs) == "Running")
        assert sorted(each["tags"][names.NAMESPACE] for each in world.host.named("golden-")) == ["default", "other"]


CLAIM = "/api/v1/namespaces/default/persistentvolumeclaims/data"


async def test_a_claim_of_another_class_gets_no_volume(world: World, autojump_clock: MockClock) -> None:
    """The annotations that a scheduler writes can be written by anyone who makes claims."""
    world.cluster.put("/apis/storage.k8s.io/v1/storageclasses/fast", {"provisioner": "example.com/fast"})
    world.cluster.put(CLAIM, claim("fast"))
    async with world.running():
        await trio.sleep(60)
        assert not world.host.volumes


async def test_a_volume_of_another_claim_is_not_mounted(world: World, autojump_clock: MockClock) -> None:
    about = {"annotations": {names.PROVISIONER: "disk"}}
    world.cluster.put("/api/v1/persistentvolumes/pvc-1", {"metadata": about, "spec": {"claimRef": {"uid": "theirs"}}})
    mine = {**claim(), "status": {"phase": "Bound"}}
    mine["spec"]["volumeName"] = "pvc-1"
    world.cluster.put(CLAIM, mine)
    path = world.add_pod(
        container={"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    )
    async with world.running():
        await world.until(lambda: world.waits_for(path) == "CreateContainerConfigError")
        assert world.has_event("Failed", "belongs to another claim") and not world.host.instances


@pytest.mark.parametrize("name", ["../../other/sandboxes/box", "box?watch=true", "..", "a b#c"])
def test_an_owners_name_is_one_segment_of_a_path(name: str) -> None:
    path = names.owner_path(
        OwnerReference(api_version="agents.x-k8s.io/v1", kind="Sandbox", name=name, uid="uid"), "default"
    )
    assert path is not None and path.startswith("/apis/agents.x-k8s.io/v1/namespaces/default/sandboxes/")
    last = path.split("/")[-1]
    assert path.count("/") == 7 and not {"?", "#", " "} & set(last) and last != ".."
