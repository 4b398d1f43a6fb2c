"""The node program killed, its connection cut, or an error for an answer, at every request to the cluster and to the
host and at every event of a watch: the next run, or the next attempt, ends in the same state, and there was never a
second instance for a pod.

Each story runs once undisturbed to count its requests; then once for each of them that is disturbed before it took
effect, and once for each write that is disturbed after.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from tests.kube.fake_cluster import Fault, Faults
from tests.kube.world import REPLICA_SET, SANDBOX, SANDBOX_PATH, WARM_POOL_PATH, World

Story = Callable[[World], Awaitable[None]]


async def born_and_deleted(world: World) -> None:
    world.cluster.put("/api/v1/namespaces/default/configmaps/c", {"data": {"a": "b"}})
    path = world.add_pod(
        owner=REPLICA_SET,
        container={"volumeMounts": [{"name": "c", "mountPath": "/c"}]},
        volumes=[{"name": "c", "configMap": {"name": "c"}}],
    )
    await world.until(lambda: world.phase(path) == "Running", seconds=300)
    assert len(world.host.instances) == 1 and world.host.made == 1, "a second instance was made"
    world.cluster.delete_pod(path)
    await world.until(lambda: world.phase(path) == "gone", seconds=300)
    await world.until(lambda: not world.host.instances and not world.host.volumes, seconds=300)


async def suspended_and_continued(world: World) -> None:
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    path = world.add_pod("box", owner=SANDBOX)
    await world.until(lambda: world.phase(path) == "Running", seconds=300)
    world.cluster.delete_pod(path)
    await world.until(lambda: world.phase(path) == "gone", seconds=300)
    assert [each["state"] for each in world.host.instances.values()] == ["Standby"]
    path = world.add_pod("box", owner=SANDBOX)
    await world.until(lambda: world.phase(path) == "Running", seconds=300)
    assert world.host.made == 1, "its memory was lost"


async def forked(world: World) -> None:
    world.cluster.put(WARM_POOL_PATH, {"metadata": {"uid": "rs-1"}})
    owner = {**REPLICA_SET, "apiVersion": "extensions.agents.x-k8s.io/v1alpha1", "kind": "SandboxWarmPool"}
    paths = [world.add_pod(name, owner=owner, annotations={"hypeman.dev/golden": "true"}) for name in ("one", "two")]
    await world.until(lambda: all(world.phase(path) == "Running" for path in paths), seconds=300)
    assert world.host.made == 3, "one to fork from, and two forks"


STORIES = (born_and_deleted, suspended_and_continued, forked)


@pytest.mark.parametrize("side", ["cluster", "host"])
@pytest.mark.parametrize("fault", ["killed", "cut", 429, 500, 504])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
async def test_every_request(story: Story, fault: Fault, side: str, autojump_clock: MockClock) -> None:
    world = World()
    async with world.running():
        await story(world)
    seen = _faults(world, side).seen
    writes = [number for number, what in enumerate(seen, 1) if not what.startswith(("GET", "EVENT"))]
    assert len(writes) > 4, "the story has something to disturb"
    for at in range(1, len(seen) + 1):
        await _disturbed(story, fault, side, at, after=False)
    for at in writes if fault != 429 else ():  # which says that nothing was done
        await _disturbed(story, fault, side, at, after=True)


async def _disturbed(story: Story, fault: Fault, side: str, at: int, *, after: bool) -> None:
    world = World()
    faults = _faults(world, side)
    faults.arm(at, fault, after=after)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_running, world, faults.died)
            await story(world)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as failure:
        what = faults.seen[at - 1] if at <= len(faults.seen) else "never reached"
        when = "after" if after else "before"
        failure.add_note(f"{fault} at request {at} of the {side} ({what}), {when} it took effect")
        raise


async def _keep_running(world: World, died: trio.Event) -> None:
    """The program, started again after it was killed, as by systemd."""
    async with world.running() as scope:
        await died.wait()
        scope.cancel()
    world.cluster.drop_watches()
    await trio.sleep(1)
    await world.node()


def _faults(world: World, side: str) -> Faults:
    return world.cluster.faults if side == "cluster" else world.host.faults
