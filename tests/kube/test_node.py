"""The node program between a cluster and a host that are both fakes: what becomes of pods, and after which failure.

The clock jumps over waits (``autojump_clock``).
"""

from __future__ import annotations

import base64
import io
import tarfile
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hypeman.instances.model.types import Instance, InstanceState
from hypeman.kube import names, pods, probes
from hypeman.kube.api import ApiClient, Change
from hypeman.kube.credentials import Access
from hypeman.kube.decide import Action, Known, decide
from hypeman.kube.podspec import Probe
from hypeman.kube.reflector import Reflector
from hypeman.kube.types import ObjectMeta, Pod
from tests.kube.world import NODE_PATH, REPLICA_SET, SANDBOX, SANDBOX_PATH, WARM_POOL_PATH, World, pod


@pytest.fixture
def world() -> World:
    return World()


def secret(**data: str) -> dict[str, Any]:
    return {"data": {key.replace("__", "."): base64.b64encode(value.encode()).decode() for key, value in data.items()}}


# ── The node ────────────────────────────────────────────────────────────────────────────────────


async def test_a_clock_that_was_set_back_sends_heartbeats(world: World, autojump_clock: MockClock) -> None:
    """The cluster counts a renewal that is later than the last one; also what an earlier program wrote is one."""
    lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/here"
    ahead = datetime(2100, 1, 1, tzinfo=UTC)
    world.cluster.put(lease, {"spec": {"holderIdentity": "here", "renewTime": "2100-01-01T00:00:00.000000Z"}})
    async with world.running():
        seen = []
        for _ in range(3):
            await trio.sleep(40)
            seen.append(datetime.fromisoformat(world.cluster.objects[lease]["spec"]["renewTime"]))
    assert ahead < seen[0] < seen[1] < seen[2] < ahead + timedelta(seconds=1)


@pytest.mark.parametrize(("ahead", "status"), [(7200, "True"), (-7200, "True"), (0, "False")])
async def test_a_clock_that_is_off_is_a_condition_of_the_node(
    world: World, autojump_clock: MockClock, ahead: int, status: str
) -> None:
    world.cluster.clock = lambda: datetime.now(UTC) - timedelta(seconds=ahead)
    path = world.add_pod()
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        await trio.sleep(400)
        found = {condition["type"]: condition for condition in world.cluster.objects[NODE_PATH]["status"]["conditions"]}
    assert (found["ClockSkewed"]["status"], found["Ready"]["status"]) == (status, "True")


async def test_the_node_registers_and_renews_its_lease(world: World, autojump_clock: MockClock) -> None:
    lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/here"
    async with world.running():
        await world.until(lambda: (world.cluster.get(NODE_PATH) or {}).get("status", {}).get("conditions"))
        node = world.cluster.objects[NODE_PATH]
        assert node["spec"]["taints"] == [{"key": "hypeman.dev/host", "value": "true", "effect": "NoSchedule"}]
        assert node["metadata"]["labels"]["hypeman.dev/host"] == "true"
        status = node["status"]
        assert (status["capacity"]["cpu"], status["capacity"]["memory"]) == ("16", f"{64 << 20}Ki")
        assert {condition["type"]: condition["status"] for condition in status["conditions"]}["Ready"] == "True"
        assert status["declaredFeatures"] == ["ExtendWebSocketsToKubelet"]
        assert status["addresses"][0] == {"type": "InternalIP", "address": "192.0.2.7"}
        before = world.cluster.objects[lease]["spec"]["renewTime"]
        await world.until(lambda: world.cluster.objects[lease]["spec"]["renewTime"] != before)
        world.host.faults.away = True
        await trio.sleep(11)
        before = world.cluster.objects[lease]["spec"]["renewTime"]
        await trio.sleep(60)
        assert world.cluster.objects[lease]["spec"]["renewTime"] == before, "a node without its server is no node"


async def test_a_node_that_the_cluster_has_marked_is_ready_again(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        await world.until(lambda: ready(world) == "True")
        marked = world.cluster.objects[NODE_PATH]
        for each in marked["status"]["conditions"]:
            each |= {"status": "Unknown", "reason": "NodeStatusUnknown"}
        world.cluster.put(NODE_PATH, marked)
        await world.until(lambda: ready(world) == "True", seconds=30)


def ready(world: World) -> str:
    """Of the node."""
    found = (world.cluster.get(NODE_PATH) or {}).get("status", {}).get("conditions", [])
    return next((each["status"] for each in found if each["type"] == "Ready"), "")


async def test_a_node_that_was_deleted_registers_again(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        await world.until(lambda: world.cluster.get(NODE_PATH))
        world.cluster.remove(NODE_PATH)
        world.host.devices.append(gpu(1))
        await world.until(lambda: world.cluster.get(NODE_PATH), seconds=60)
        await world.until(
            lambda: (
                world.cluster.objects[NODE_PATH].get("status", {}).get("capacity", {}).get("hypeman.dev/gpu-10de-2235")
            )
        )


# ── Pods ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_node_that_was_marked_as_gone_takes_it_back(world: World, autojump_clock: MockClock) -> None:
    """With its next heartbeat, not minutes later: until then the cluster sends no pods."""

    def ready() -> str:
        found = (world.cluster.get(NODE_PATH) or {}).get("status", {}).get("conditions", [])
        return next((str(each["status"]) for each in found if each["type"] == "Ready"), "")

    async with world.running():
        await world.until(lambda: ready() == "True")
        node = world.cluster.objects[NODE_PATH]
        marked = [{**condition, "status": "Unknown"} for condition in node["status"]["conditions"]]
        world.cluster.put(NODE_PATH, {**node, "status": {**node["status"], "conditions": marked}})
        assert ready() == "Unknown"
        await world.until(lambda: ready() == "True", seconds=30)


async def test_a_pod_becomes_an_instance_and_is_deleted(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(
        container={
            "command": ["serve"],
            "args": ["--name=$(NAME)", "$$(NAME)"],
            "env": [{"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "resources": {"limits": {"memory": "256Mi", "cpu": "1500m"}},
        }
    )
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (instance,) = world.host.instances.values()
        asked = world.host.requests[instance["id"]]
        assert asked["env"] == {"NAME": "web"}
        assert (asked["entrypoint"], asked["cmd"]) == (["serve"], ["--name=web", "$(NAME)"])
        assert (asked["size"], asked["vcpus"]) == (str(256 << 20), 2)
        uid = world.cluster.objects[path]["metadata"]["uid"]
        assert instance["name"] == f"web-{uid.replace('-', '')[:8]}"
        assert instance["tags"]["kubernetes.io/pod-uid"] == uid
        status = world.status(path)
        assert (status["podIP"], status["hostIP"]) == ("10.0.0.1", "192.0.2.7")
        assert {condition["type"]: condition["status"] for condition in status["conditions"]}["Ready"] == "True"
        assert status["containerStatuses"][0]["containerID"] == f"hypeman://{instance['id']}"
        assert {"Pulling", "Pulled", "Created", "Started"} <= set(world.reasons())
        world.cluster.delete_pod(path, grace=7)
        await world.until(lambda: world.phase(path) == "gone")
        assert not world.host.instances
        assert f"POST /instances/{instance['id']}/stop" in world.host.calls


async def test_configuration_and_secrets_become_environment_and_files(world: World, autojump_clock: MockClock) -> None:
    world.cluster.put("/api/v1/namespaces/default/configmaps/settings", {"data": {"MODE": "fast", "a.conf": "x=1"}})
    path = world.add_pod(
        container={
            "envFrom": [{"configMapRef": {"name": "settings"}, "prefix": "P_"}],
            "env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "key"}}}],
            "volumeMounts": [{"name": "conf", "mountPath": "/srv/conf"}, {"name": "scratch", "mountPath": "/scratch"}],
        },
        volumes=[
            {"name": "conf", "projected": {"defaultMode": 0o640, "sources": [
                {"configMap": {"name": "settings", "items": [{"key": "a.conf", "path": "d/a.conf"}]}},
                {"secret": {"name": "keys"}},
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            ]}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "3Gi"}},
        ],
    )  # fmt: skip
    async with world.running():
        await world.until(lambda: "Failed" in world.reasons())
        waiting = world.status(path)["containerStatuses"][0]["state"]["waiting"]
        assert (waiting["reason"], waiting["message"]) == ("CreateContainerConfigError", 'secret "keys" not found')
        world.cluster.put("/api/v1/namespaces/default/secrets/keys", secret(key="hunter2"))
        await world.until(lambda: world.phase(path) == "Running")
        (asked,) = world.host.requests.values()
        assert asked["env"]["P_MODE"] == "fast" and asked["env"]["KEY"] == "hunter2"
        (archive,) = world.host.archives.values()
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            found = {member.name: member for member in tar.getmembers()}
            assert tar.extractfile("d/a.conf").read() == b"x=1"  # type: ignore[union-attr]
            assert tar.extractfile("token").read() == b"token-of-default"  # type: ignore[union-attr]
        assert found["key"].mode == 0o640 and found["d"].isdir()
        assert sorted(volume["size_gb"] for volume in world.host.volumes.values()) == [1, 3]
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")
        assert not world.host.volumes, "they lived as long as the pod"


POD_IP = {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hostNetwork": True}, "spec.hostNetwork"),
        ({"initContainers": [{"name": "i", "image": "x"}]}, "spec.initContainers"),
        ({"containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]}, "spec.containers"),
        ({"somethingNew": {"a": 1}}, "spec.somethingNew"),
        ({"container": {"lifecycle": {"preStop": {}}}}, "spec.containers[0].lifecycle"),
        ({"container": {"env": [POD_IP]}}, "status.podIP"),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_refused_by_name(
    world: World, autojump_clock: MockClock, fields: dict[str, Any], named: str
) -> None:
    path = world.add_pod(**fields)
    async with world.running():
        await world.until(lambda: world.phase(path) == "Failed")
        assert world.status(path)["reason"] == "Unsupported"
        assert named in world.status(path)["message"]
        await world.until(
            lambda: any(reason == "Unsupported" and named in text for reason, text in world.cluster.events())
        )
        assert not world.host.instances
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")


async def test_what_weakens_only_the_guest_is_noted(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(container={"securityContext": {"allowPrivilegeEscalation": False}})
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        await world.until(lambda: "NotApplied" in world.reasons())
        assert "allowPrivilegeEscalation" in str(world.cluster.events())


@pytest.mark.parametrize(
    ("policy", "code", "phase", "reason"),
    [
        ("Never", 0, "Succeeded", "Completed"),
        ("Never", 3, "Failed", "Error"),
        ("OnFailure", 0, "Succeeded", "Completed"),
    ],
)
async def test_a_program_that_ends(
    world: World, autojump_clock: MockClock, policy: str, code: int, phase: str, reason: str
) -> None:
    path = world.add_pod(restartPolicy=policy)
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (identifier,) = world.host.instances
        world.host.end(identifier, code)
        await world.until(lambda: world.phase(path) == phase)
        ended = world.status(path)["containerStatuses"][0]["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (code, reason)
        assert identifier in world.host.instances, "its log can be read until the pod is deleted"
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")
        assert not world.host.instances


async def test_a_program_that_is_restarted(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod()
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (identifier,) = world.host.instances
        world.host.end(identifier, 1)
        await world.until(lambda: world.waits_for(path) == "CrashLoopBackOff")
        assert world.container(path)["lastState"]["terminated"]["exitCode"] == 1 and not world.container(path)["ready"]
        world.host.change(
            identifier,
            state="Running",
            started_at="2099-01-01T00:00:00Z",
            exit_code=None,
            restart_status={"attempts": 1},
        )
        await world.until(lambda: "running" in world.container(path)["state"])
        again = world.container(path)
        assert (again["restartCount"], again["ready"], world.phase(path)) == (1, True, "Running")


async def test_an_image_that_cannot_be_pulled_and_then_can(world: World, autojump_clock: MockClock) -> None:
    world.host.broken_images["nginx:alpine"] = "no such image"
    login = {"auths": {"https://index.docker.io/v1/": {"auth": base64.b64encode(b"me:pw").decode()}, "other.io": {}}}
    data = base64.b64encode(str(login).replace("'", '"').encode()).decode()
    world.cluster.put("/api/v1/namespaces/default/secrets/login", {"data": {".dockerconfigjson": data}})
    path = world.add_pod(imagePullSecrets=[{"name": "login"}, {"name": "absent"}])
    async with world.running():
        await world.until(lambda: world.has_event("Failed", "no such image"))
        await world.until(lambda: world.waits_for(path) == "ImagePullBackOff")
        message = world.container(path)["state"]["waiting"]["message"]
        assert message == 'Back-off pulling image "nginx:alpine": ErrImagePull: no such image'
        world.host.broken_images.clear()
        await world.until(lambda: world.phase(path) == "Running")
        assert {str(pull["credentials"]) for pull in world.host.pulls} == {str({"username": "me", "password": "pw"})}


async def test_a_host_without_room_fails_the_pod_like_a_kubelet(world: World, autojump_clock: MockClock) -> None:
    world.host.room = 0
    path = world.add_pod()
    world.cluster.objects[path]["status"]["startTime"] = "2020-01-01T00:00:00Z"
    async with world.running():
        await world.until(lambda: world.phase(path) == "Failed")
        assert world.status(path)["reason"] == "OutOfmemory"


async def test_two_pods_with_the_same_name_one_after_the_other(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod()
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (first,) = world.host.instances
        world.cluster.remove(path)  # a force deletion
        world.cluster.put(path, pod())
        await world.until(lambda: first not in world.host.instances and world.phase(path) == "Running")
        (second,) = world.host.instances.values()
        assert second["tags"]["kubernetes.io/pod-uid"] == world.cluster.objects[path]["metadata"]["uid"]


async def test_new_values_of_credentials_are_passed_on(world: World, autojump_clock: MockClock) -> None:
    place = "/api/v1/namespaces/default/secrets/keys"
    rules = '{"KEY": {"source": {"env": "REAL"}, "inject": [{"as": {"basic": {"username": "x"}}}]}}'
    world.cluster.put(place, secret(credentials__json=rules, REAL="one"))
    path = world.add_pod(
        annotations={"hypeman.dev/credentials": "keys"},
        volumes=[{"name": "keys", "secret": {"secretName": "keys"}}],
    )
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (instance,) = world.host.instances.values()
        assert world.host.requests[instance["id"]]["env"] == {"REAL": "one"}
        assert not world.host.archives, "the guest does not have it as a file"
        world.cluster.put(place, secret(credentials__json=rules, REAL="two"))
        await world.until(lambda: instance.get("env") == {"REAL": "two"})
        patches = world.host.calls.count(f"PATCH /instances/{instance['id']}")
        await trio.sleep(120)
        assert world.host.calls.count(f"PATCH /instances/{instance['id']}") == patches, "once for each version"


async def test_a_secret_of_credentials_has_to_be_the_pods(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(annotations={"hypeman.dev/credentials": "keys"})
    async with world.running():
        await world.until(lambda: world.phase(path) == "Failed")
        assert "hypeman.dev/credentials" in world.status(path)["message"]


async def test_an_action_that_changes_nothing_is_not_repeated_without_a_pause(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.add_pod()
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (instance,) = world.host.instances.values()
        verb = world.host._verb
        monkeypatch.setattr(world.host, "_verb", lambda found, name, body: found)
        world.cluster.delete_pod(path)
        await trio.sleep(60)
        assert 3 < world.host.calls.count(f"POST /instances/{instance['id']}/stop") < 30
        monkeypatch.setattr(world.host, "_verb", verb)
        await world.until(lambda: world.phase(path) == "gone")


# ── Owners, standby, forks ──────────────────────────────────────────────────────────────────────


async def test_a_suspended_sandbox_is_saved_and_continued(world: World, autojump_clock: MockClock) -> None:
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    path = world.add_pod("box", owner=SANDBOX)
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (identifier,) = world.host.instances
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")
        assert world.host.instances[identifier]["state"] == "Standby"
        await trio.sleep(120)
        assert identifier in world.host.instances, "its owner lives"
        path = world.add_pod("box", owner=SANDBOX)
        await world.until(lambda: world.phase(path) == "Running")
        assert list(world.host.instances) == [identifier] and world.host.made == 1
        assert world.host.instances[identifier]["state"] == "Running"
        assert {"Adopted", "Restored", "Standby"} <= set(world.reasons())
        world.cluster.remove(SANDBOX_PATH)
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")
        assert not world.host.instances


async def test_memory_of_another_template_is_not_used(world: World, autojump_clock: MockClock) -> None:
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    path = world.add_pod("box", owner=SANDBOX)
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")
        (before,) = world.host.instances
        path = world.add_pod("box", owner=SANDBOX, container={"image": "nginx:2"})
        await world.until(lambda: world.phase(path) == "Running")
        (after,) = world.host.instances.values()
        assert (after["id"] != before, after["image"]) == (True, "nginx:2")
        assert "StateDiscarded" in world.reasons()


async def test_a_pod_that_took_the_name_is_not_deleted(world: World, autojump_clock: MockClock) -> None:
    """Between what the node knows and its request, another pod got the name."""
    path = world.add_pod()
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        world.cluster.delete_pod(path)
        successor = {**world.cluster.objects[path], "metadata": {"name": "web", "namespace": "default", "uid": "new"}}
        world.cluster.objects[path] = successor
        await world.until(lambda: not world.host.instances)
        await trio.sleep(1)
        assert path in world.cluster.objects


async def test_an_owner_that_cannot_be_looked_up_loses_nothing(world: World, autojump_clock: MockClock) -> None:
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    path = world.add_pod("box", owner={**SANDBOX, "apiVersion": "agents.x-k8s.io/v9"})
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        world.cluster.objects.pop(SANDBOX_PATH)
        answer, world.cluster._answer = world.cluster._answer, _no_such_kind(world)  # type: ignore[method-assign]
        world.cluster.delete_pod(path)
        await trio.sleep(100)
        assert len(world.host.instances) == 1 and world.phase(path) != "gone"
        world.cluster._answer = answer  # type: ignore[method-assign]
        await world.until(lambda: world.phase(path) == "gone")


def _no_such_kind(world: World) -> Any:
    from tests.kube.fake_cluster import Refuse

    answer = world.cluster._answer

    def refuse(method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if "agents.x-k8s.io" in path:
            raise Refuse(404, "NotFound", "the server could not find the requested resource")
        return answer(method, path, query, body)

    return refuse


async def test_a_warm_pool_is_forked_from_one_boot(world: World, autojump_clock: MockClock) -> None:
    owner = {**REPLICA_SET, "apiVersion": "extensions.agents.x-k8s.io/v1alpha1", "kind": "SandboxWarmPool"}
    world.cluster.put(
        "/apis/extensions.agents.x-k8s.io/v1alpha1/namespaces/default/sandboxwarmpools/rs",
        {"metadata": {"uid": "rs-1"}},
    )
    golden = {"hypeman.dev/golden": "true"}
    token = {"name": "kube-api-access-x", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
    mount = {"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
    paths = [
        world.add_pod(f"warm-{number}", owner=owner, annotations=golden, volumes=[token],
                      container={"volumeMounts": [mount]})
        for number in range(3)
    ]  # fmt: skip
    async with world.running():
        await world.until(lambda: all(world.phase(path) == "Running" for path in paths))
        states = sorted(
            (instance["name"].split("-")[0], instance["state"]) for instance in world.host.instances.values()
        )
        assert states == [("golden", "Standby"), *[("warm", "Running")] * 3]
        assert world.host.calls.count("POST /instances") == 1
        for path in paths:
            world.cluster.delete_pod(path)
        await world.until(lambda: all(world.phase(path) == "gone" for path in paths))
        assert len(world.host.instances) == 1, "the pool may need it again"
        world.cluster.remove(WARM_POOL_PATH)
        await world.until(lambda: not world.host.instances)


async def test_a_pod_with_something_of_its_own_cannot_be_a_fork(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(
        annotations={"hypeman.dev/golden": "true"},
        container={"volumeMounts": [{"name": "c", "mountPath": "/c"}]},
        volumes=[{"name": "c", "configMap": {"name": "c", "optional": True}}],
    )
    async with world.running():
        await world.until(lambda: world.phase(path) == "Failed")
        assert "'c'" in world.status(path)["message"] and "containerStatuses" not in world.status(path)


@pytest.mark.parametrize(("name", "value"), [(names.FENCING, "standy"), (names.GOLDEN, "yes")])
async def test_an_annotation_that_says_nothing_is_refused(
    world: World, autojump_clock: MockClock, name: str, value: str
) -> None:
    path = world.add_pod(annotations={name: value})
    async with world.running():
        await world.until(lambda: world.phase(path) == "Failed")
        assert world.has_event("Unsupported", f"metadata.annotations[{name}]: '{value}' is none of")
        assert not world.host.made


async def test_golden_false_is_an_ordinary_pod(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(annotations={names.GOLDEN: "false", "hypeman.dev/credential": "keys"})
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        assert len(world.host.instances) == 1
        assert world.has_event("NotApplied", "metadata.annotations[hypeman.dev/credential]"), "a misspelt one is said"


async def test_a_runtime_class_is_for_vms_or_refused(world: World, autojump_clock: MockClock) -> None:
    """A cluster may have several for these hosts, with another overhead; those of other runtimes are not for them."""
    classes = {"hypeman-large": "hypeman", "gvisor": "runsc"}
    for name, handler in classes.items():
        world.cluster.put(f"/apis/node.k8s.io/v1/runtimeclasses/{name}", {"handler": handler})
    paths = {name: world.add_pod(name, runtimeClassName=name) for name in (*classes, "missing")}
    async with world.running():
        await world.until(lambda: world.phase(paths["hypeman-large"]) == "Running")
        await world.until(lambda: world.phase(paths["gvisor"]) == "Failed")
        assert world.has_event("Unsupported", "spec.runtimeClassName: 'gvisor' has the handler 'runsc'")
        await world.until(lambda: world.has_event("Failed", 'runtimeclass "missing" not found'))
        assert world.phase(paths["missing"]) == "Pending"
        assert world.host.made == 1


async def test_a_claimed_pod_belongs_to_its_sandbox(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(owner=REPLICA_SET)
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        changed = world.cluster.objects[path]
        changed["metadata"]["ownerReferences"] = [SANDBOX]
        world.cluster.put(path, changed)
        (instance,) = world.host.instances.values()
        await world.until(lambda: instance["tags"].get("kubernetes.io/owner-uid") == "sandbox-1")


# ── Outages ─────────────────────────────────────────────────────────────────────────────────────


async def test_pods_that_went_while_the_node_was_away_are_removed(world: World, autojump_clock: MockClock) -> None:
    paths = [world.add_pod(name, owner=REPLICA_SET) for name in ("one", "two")]
    async with world.running():
        await world.until(lambda: all(world.phase(path) == "Running" for path in paths))
    world.cluster.remove(paths[0])
    async with world.running():
        await world.until(lambda: not world.host.named("one"))
        await trio.sleep(60)
        assert len(world.host.named("two")) == 1 and world.host.made == 2


async def test_one_orphan_that_stays_does_not_keep_the_others(world: World, autojump_clock: MockClock) -> None:
    """The first one's memory cannot be saved for its living owner; the second one has to go."""
    world.cluster.put(SANDBOX_PATH, {"metadata": {"uid": "sandbox-1"}})
    paths = [world.add_pod("box", owner=SANDBOX), world.add_pod("web")]
    async with world.running():
        await world.until(lambda: all(world.phase(path) == "Running" for path in paths))
    world.host.broken_verbs["standby"] = (500, "internal")
    for path in paths:
        world.cluster.remove(path)
    async with world.running():
        await world.until(lambda: not world.host.named("web"))
        assert [instance["state"] for instance in world.host.instances.values()] == ["Running"]
        world.host.broken_verbs["standby"] = (501, "not_supported")
        await world.until(lambda: [instance["state"] for instance in world.host.instances.values()] == ["Stopped"])


@pytest.mark.parametrize("grace", [1, 7200])
async def test_a_pod_may_request_more_time_than_the_host_gives(
    world: World, autojump_clock: MockClock, grace: int
) -> None:
    path = world.add_pod(terminationGracePeriodSeconds=grace)
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        world.cluster.delete_pod(path, grace=grace)
        await world.until(lambda: world.phase(path) == "gone")


async def test_a_startup_probe_holds_back_readiness_and_starts_again(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a liveness probe as well. What it said survives the node program."""
    asked: list[str] = []
    good = {"start"}

    async def says(probe: Probe, *_: object) -> bool:
        assert probe.exec is not None
        asked.append(probe.exec.command[0])
        return probe.exec.command[0] in good

    monkeypatch.setattr(probes, "passes", says)
    good.clear()
    startup = {"exec": {"command": ["start"]}, "periodSeconds": 5, "failureThreshold": 3}
    path = world.add_pod(container={"startupProbe": startup, "readinessProbe": {"exec": {"command": ["ready"]}}})
    async with world.running():
        moments = []
        for number in (1, 2, 3):
            await world.until(lambda n=number: world.host.calls.count("POST /instances/i1/start") == n, seconds=300)  # type: ignore[misc]
            moments.append(trio.current_time())
        assert len(asked) in (9, 10), "three attempts in each run"
        assert moments[1] - moments[0] >= 20 and moments[2] - moments[1] >= 40, "pauses that grow"
        assert world.has_event("Unhealthy", "the startup probe failed: the program is started again")
        assert set(asked) == {"start"}, "nothing else is probed before"
        assert not world.container(path)["started"] and not world.container(path)["ready"]
        good.add("start")
        await world.until(lambda: world.container(path)["started"])
        assert not world.container(path)["ready"]
    asked.clear()
    good.add("ready")
    async with world.running():
        await world.until(lambda: world.container(path)["ready"])
        assert set(asked) == {"ready"}, "it has started before"


async def test_a_pod_that_is_not_restarted_fails_with_its_startup_probe(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> bool:
        return False

    monkeypatch.setattr(probes, "passes", fails)
    path = world.add_pod(restartPolicy="Never", container={"startupProbe": {"exec": {"command": ["x"]}}})
    async with world.running():
        await world.until(lambda: world.phase(path) == "Failed", seconds=300)
        assert world.status(path)["reason"] == "Unhealthy"
        await world.until(lambda: all(instance["state"] == "Stopped" for instance in world.host.instances.values()))


async def test_a_change_is_the_matter_of_one_pod(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps grow with the number of pods, not with its square."""
    steps = 0

    def counted(known: Known) -> Action:
        nonlocal steps
        steps += 1
        return decide(known)

    monkeypatch.setattr(pods, "decide", counted)
    counts = []
    async with world.running():
        for number in (10, 40):
            steps = 0
            paths = [world.add_pod(f"p{number}-{each}") for each in range(number)]
            await world.until(lambda paths=paths: all(world.phase(path) == "Running" for path in paths))  # type: ignore[misc]
            counts.append(steps)
            for identifier in list(world.host.instances):
                world.host.change(identifier, health_status={"status": "healthy"})
                await trio.sleep(0.1)
            counts.append(steps)
    assert counts[3] < 6 * counts[1], counts


def test_whom_an_instance_concerns() -> None:
    def made(**tags: str) -> Instance:
        state = InstanceState.RUNNING
        return Instance(id="i", name="i", image="x", state=state, created_at=datetime.now(UTC), tags=tags)

    workers, by_pod = ("one", "two", "waits"), {"one": made(), "two": made()}
    of_pod = made(**{names.POD_UID: "one"})
    golden = made(**{names.GOLDEN: "g"})
    left = made(**{names.POD_UID: "old", names.OWNER: "agents.x-k8s.io/v1 Sandbox box", names.OWNER_UID: "o"})
    for instances, pods_ in (((of_pod,), {"one"}), ((golden,), {"waits"}), ((left,), {"waits"}), ((made(),), set())):
        assert pods.concerned(instances, workers, by_pod) == pods_


async def test_concurrent_pods_choose_different_devices(world: World, autojump_clock: MockClock) -> None:
    """And a third one waits until one of them is gone."""
    world.host.devices = [gpu(number) for number in range(2)]
    wanted = {"resources": {"limits": {"hypeman.dev/gpu-10de-2235": "1"}}}
    async with world.running():
        await world.until(lambda: world.cluster.get(NODE_PATH))
        paths = [world.add_pod(f"g{number}", container=wanted) for number in range(3)]
        await world.until(lambda: [world.phase(path) for path in paths].count("Running") == 2)
        assert "FailedCreate" not in world.reasons()
        [waiting] = [path for path in paths if world.phase(path) != "Running"]
        assert world.has_event("Failed", "0 of 1 devices are free")
        world.cluster.delete_pod(next(path for path in paths if path != waiting))
        await world.until(lambda: world.phase(waiting) == "Running", seconds=300)


def gpu(number: int) -> dict[str, Any]:
    return {
        "id": f"d{number}", "name": f"d{number}", "type": "gpu", "pci_address": f"0000:0{number}:00.0",
        "vendor_id": "0x10de", "device_id": "0x2235", "iommu_group": number, "bound_to_vfio": False,
        "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip


async def test_a_probe_does_not_keep_a_pod_from_its_deletion(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(*_: object) -> bool:
        await trio.sleep(86400)
        return False

    monkeypatch.setattr(probes, "passes", hangs)
    path = world.add_pod(container={"readinessProbe": {"exec": {"command": ["x"]}, "timeoutSeconds": 86400}})
    async with world.running():
        await world.until(lambda: world.host.instances)
        await trio.sleep(10)
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")


def test_an_answer_older_than_what_the_watch_brought_is_not_used() -> None:
    """Otherwise a deletion that came between a write and its answer is lost."""
    known: Reflector[Pod] = Reflector(ApiClient(Access(server="http://cluster")), "/api/v1/pods", Pod, lambda uid: None)

    def version(number: int) -> Pod:
        return Pod(metadata=ObjectMeta(uid="u", resource_version=str(number)))

    known._apply(Change.ADDED, version(11))
    known.put(version(9))
    assert known.items["u"] == version(11)
    known.put(version(12))
    assert known.items["u"] == version(12)


async def test_a_users_fork_of_a_pods_instance_is_left_alone(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod()
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (instance,) = world.host.instances.values()
        fork = world.host._add("mine", dict(instance["tags"]), world.host.requests[instance["id"]])
        world.host._note()
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")
        await trio.sleep(60)
        assert list(world.host.instances) == [fork["id"]]


async def test_watches_that_end_or_expire_lose_nothing(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        await world.until(lambda: world.cluster.get(NODE_PATH))
        for number, expire in enumerate((False, True, True)):
            path = world.add_pod(f"web{number}")
            world.cluster.drop_watches(expire=expire)
            await world.until(lambda path=path: world.phase(path) == "Running")  # type: ignore[misc]


async def test_an_api_server_that_is_away_for_a_minute_changes_nothing(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(tolerations=[{"key": "node.kubernetes.io/unreachable", "operator": "Exists",
                                       "effect": "NoExecute", "tolerationSeconds": 300}])  # fmt: skip
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        world.cluster.faults.away = True
        world.cluster.drop_watches()
        await trio.sleep(60)
        world.cluster.faults.away = False
        late = world.add_pod("late")
        await world.until(lambda: world.phase(late) == "Running")
        assert {instance["state"] for instance in world.host.instances.values()} == {"Running"}
        assert not [call for call in world.host.calls if call.endswith(("standby", "stop"))]


@pytest.mark.parametrize(
    ("annotation", "owner", "state"),
    [
        (None, REPLICA_SET, "Standby"),
        ("stop", REPLICA_SET, "Stopped"),
        ("keep", REPLICA_SET, "Running"),
        (None, SANDBOX, "Running"),
        ("standby", SANDBOX, "Standby"),
    ],
)
async def test_a_node_that_is_cut_off_fences_itself(
    world: World, autojump_clock: MockClock, annotation: str | None, owner: dict[str, Any], state: str
) -> None:
    annotations = {"hypeman.dev/fencing": annotation} if annotation else {}
    path = world.add_pod(owner=owner, annotations=annotations)
    async with world.running() as scope:
        await world.until(lambda: world.phase(path) == "Running")
        (instance,) = world.host.instances.values()
        world.cluster.faults.away = True
        world.cluster.drop_watches()
        await trio.sleep(30)
        assert instance["state"] == "Running", "the cluster waits as long, too"
        await trio.sleep(45)
        assert instance["state"] == state
        world.cluster.faults.away = False
        await world.until(lambda: instance["state"] == "Running", what="restored or started again")
        assert world.host.made == 1
        scope.cancel()


async def test_a_vm_whose_memory_cannot_be_saved_is_fenced_by_a_stop(world: World, autojump_clock: MockClock) -> None:
    path = world.add_pod(owner=REPLICA_SET)
    async with world.running():
        await world.until(lambda: world.phase(path) == "Running")
        (instance,) = world.host.instances.values()
        world.host.broken_verbs["standby"] = (409, "insufficient_resources")
        world.cluster.faults.away = True
        world.cluster.drop_watches()
        await trio.sleep(75)
        assert instance["state"] == "Stopped"


# ── Volumes ─────────────────────────────────────────────────────────────────────────────────────


def claim(kind: str = "local") -> dict[str, Any]:
    return {
        "metadata": {"annotations": {"volume.kubernetes.io/selected-node": "here",
                                     "volume.kubernetes.io/storage-provisioner": "hypeman.dev/local"}},
        "spec": {"storageClassName": kind, "accessModes": ["ReadWriteOnce"],
                 "resources": {"requests": {"storage": "5Gi"}}, "volumeMode": "Filesystem"},
        "status": {"phase": "Pending"},
    }  # fmt: skip


async def test_a_claim_becomes_a_volume_of_this_host(world: World, autojump_clock: MockClock) -> None:
    world.cluster.put("/apis/storage.k8s.io/v1/storageclasses/local", {"provisioner": "hypeman.dev/local"})
    place = "/api/v1/namespaces/default/persistentvolumeclaims/data"
    uid = world.cluster.put(place, claim())["metadata"]["uid"]
    path = world.add_pod(
        container={"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    )
    async with world.running():
        await world.until(lambda: world.cluster.get(f"/api/v1/persistentvolumes/pvc-{uid}"))
        made = world.cluster.objects[f"/api/v1/persistentvolumes/pvc-{uid}"]
        assert made["spec"]["claimRef"]["uid"] == uid and made["spec"]["persistentVolumeReclaimPolicy"] == "Delete"
        assert world.host.volumes[f"pvc-{uid}"]["size_gb"] == 5
        bound = {**claim(), "status": {"phase": "Bound"}}
        bound["spec"]["volumeName"] = f"pvc-{uid}"
        world.cluster.put(place, bound)
        await world.until(lambda: world.phase(path) == "Running")
        (asked,) = world.host.requests.values()
        assert asked["volumes"][0]["volume_id"] == f"pvc-{uid}" and not asked["volumes"][0]["readonly"]
        world.cluster.delete_pod(path)
        await world.until(lambda: world.phase(path) == "gone")
        assert f"pvc-{uid}" in world.host.volumes, "it outlives the pod"
        world.cluster.remove(place)
        world.cluster.put(f"/api/v1/persistentvolumes/pvc-{uid}", {**made, "status": {"phase": "Released"}})
        await world.until(lambda: world.cluster.get(f"/api/v1/persistentvolumes/pvc-{uid}") is None)
        assert not world.host.volumes


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"accessModes": ["ReadWriteMany"]}, "spec.accessModes: ReadWriteMany"),
        ({"volumeMode": "Block"}, "spec.volumeMode: Block"),
        ({"dataSource": {"kind": "PersistentVolumeClaim", "name": "other"}}, "spec.dataSource:"),
        ({"dataSourceRef": {"kind": "VolumeSnapshot", "name": "s"}}, "spec.dataSourceRef:"),
        ({"selector": {"matchLabels": {"disk": "fast"}}}, "spec.selector:"),
        ({"volumeAttributesClassName": "fast"}, "spec.volumeAttributesClassName:"),
        ({"resources": {"requests": {"storage": "1Gi"}, "limits": {"storage": "1Gi"}}}, "spec.resources.limits:"),
        ({"somethingNew": 1}, "spec.somethingNew:"),
    ],
)
async def test_a_claim_that_cannot_be_done_is_refused_by_name(
    world: World, autojump_clock: MockClock, asked: dict[str, Any], named: str
) -> None:
    world.cluster.put("/apis/storage.k8s.io/v1/storageclasses/local", {"provisioner": "hypeman.dev/local"})
    wrong = claim()
    wrong["spec"] |= asked
    world.cluster.put("/api/v1/namespaces/default/persistentvolumeclaims/data", wrong)
    async with world.running():
        await world.until(lambda: world.has_event("ProvisioningFailed", named))
        assert not world.host.volumes


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ({"parameters": {"type": "ssd"}}, "StorageClass 'local' parameters.type: 'ssd'"),
        ({"parameters": {"fsType": "xfs"}}, "parameters.fsType"),
        ({"mountOptions": ["noatime"]}, "mountOptions: noatime"),
        ({"allowVolumeExpansion": True}, "allowVolumeExpansion"),
    ],
)
async def test_a_storage_class_that_cannot_be_done_is_refused_by_name(
    world: World, autojump_clock: MockClock, kind: dict[str, Any], named: str
) -> None:
    world.cluster.put("/apis/storage.k8s.io/v1/storageclasses/local", {"provisioner": "hypeman.dev/local", **kind})
    world.cluster.put("/api/v1/namespaces/default/persistentvolumeclaims/data", claim())
    async with world.running():
        await world.until(lambda: world.has_event("ProvisioningFailed", named))
        assert not world.host.volumes
