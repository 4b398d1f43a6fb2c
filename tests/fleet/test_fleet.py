"""Hosts as nodes of a real cluster: each row of docs/kubernetes.md, with fake VMMs unless it says otherwise."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.bench.fake_vmm_server import GPU_CLASS, GPUS, PROFILE
from tests.fleet.control import GRACE_SECONDS, eventually
from tests.fleet.fleet import (
    Fleet,
    deployment,
    gone_after,
    in_namespace,
    is_running,
    pod,
    resources,
    without_real,
)
from tests.fleet.hosts import FENCE_SECONDS, Host
from tests.real.appliance import ROOT, short_directory

pytestmark = pytest.mark.fleet

SPREAD = [
    {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }
]

PREFERRED = [{**SPREAD[0], "whenUnsatisfiable": "ScheduleAnyway"}]


def places(pods: list[dict[str, Any]]) -> Counter[str]:
    return Counter(each["spec"]["nodeName"] for each in pods)


def events(fleet: Fleet, namespace: str) -> list[str]:
    return [f"{each['reason']}: {each['message']}" for each in fleet.control.get("events", "-n", namespace)["items"]]


# ── Joining ─────────────────────────────────────────────────────────────────────────────────────


def test_nodes_have_what_their_hosts_have(fleet: Fleet) -> None:
    for host in fleet.hosts:
        node = fleet.control.get("node", host.name)
        resources_there = host.ask("GET", "/resources")
        assert node["status"]["capacity"]["cpu"] == str(resources_there["cpu"]["effective_limit"])
        assert node["status"]["declaredFeatures"] == ["ExtendWebSocketsToKubelet"]
        assert {"key": "hypeman.dev/host", "value": "true", "effect": "NoSchedule"} in node["spec"]["taints"]
        assert node["metadata"]["labels"]["hypeman.dev/host"] == "true"
        lease = fleet.control.get("lease", host.name, "-n", "kube-node-lease")
        assert lease["spec"]["holderIdentity"] == host.name
    described = fleet.control.kubectl("describe", "node", "host1")
    for words in ("hypeman://", "KubeletReady", "Allocatable", "10.87.0.11", "Capacity"):
        assert words in described, described


def test_the_manifest_is_what_is_applied(fleet: Fleet) -> None:
    """`hypeman node manifest | kubectl diff -f -`, as after an upgrade."""
    argv = [sys.executable, "-m", "hypeman", "node", "manifest"]
    manifest = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert len(manifest.split("---")) == 6
    difference = fleet.control.try_kubectl("diff", "-f", "-", stdin=manifest)
    assert (difference.returncode, difference.stdout) == (0, ""), difference


def test_a_node_may_do_no_more_than_it_needs(fleet: Fleet) -> None:
    """Its identity is system:node:NAME, and a host's binding is for that host."""

    def may(*question: str, user: str = "system:node:host1") -> bool:
        arguments = ["auth", "can-i", *question, f"--as={user}", "--as-group=system:nodes"]
        return fleet.control.try_kubectl(*arguments).stdout.strip() == "yes"

    assert may("get", "persistentvolumeclaims")
    assert not may("get", "persistentvolumeclaims", user="system:node:stranger")
    for question in (
        ("list", "secrets"), ("get", "secrets", "-n", "kube-system"), ("delete", "deployments"),
        ("create", "pods", "--subresource=exec"),
        ("create", "clusterrolebindings"), ("patch", "sandboxes.agents.x-k8s.io"), ("delete", "persistentvolumeclaims"),
    ):  # fmt: skip
        assert not may(*question), question
    for request in fleet.control.get("csr")["items"]:
        assert request["spec"]["username"].startswith(("system:bootstrap:", "system:node:")), "no administrator's token"


def test_the_kubelets_api_is_closed_to_others(fleet: Fleet) -> None:
    """Without a certificate or token nothing; with a token only what its owner may."""
    import ssl

    fleet.control.kubectl("create", "serviceaccount", "scraper", "-n", "default")
    try:
        token = fleet.control.kubectl("create", "token", "scraper", "-n", "default").strip()
        program = (
            "import ssl, sys, urllib.request, urllib.error\n"
            "context = ssl.create_default_context(cafile=sys.argv[1])\n"
            "request = urllib.request.Request(sys.argv[2], headers=dict(a.split('=', 1) for a in sys.argv[3:]))\n"
            "try: print(urllib.request.urlopen(request, context=context).status)\n"
            "except urllib.error.HTTPError as error: print(error.code)\n"
        )

        def ask(path: str, *headers: str) -> str:
            url = f"https://10.87.0.11:10250{path}"
            argv = [sys.executable, "-c", program, str(fleet.control.directory / "ca.pem"), url, *headers]
            return subprocess.run(fleet.control.namespace.command(*argv), capture_output=True, text=True).stdout.strip()

        assert ask("/pods") == "401"
        assert ask("/pods", "Authorization=Bearer nonsense") == "401"
        assert ask("/metrics/resource", f"Authorization=Bearer {token}") == "403"
        fleet.control.kubectl("create", "clusterrole", "scrape", "--verb=get", "--resource=nodes/metrics")
        fleet.control.kubectl(
            "create", "clusterrolebinding", "scrape", "--clusterrole=scrape", "--serviceaccount=default:scraper"
        )
        # a refusal is kept for half a minute
        eventually(lambda: ask("/metrics/resource", f"Authorization=Bearer {token}") == "200", "the scraper may")
        assert ask("/pods", f"Authorization=Bearer {token}") == "403"
        assert ssl.OPENSSL_VERSION
    finally:
        for kind, name in (("clusterrolebinding", "scrape"), ("clusterrole", "scrape")):
            fleet.control.try_kubectl("delete", kind, name)
        fleet.control.kubectl("delete", "serviceaccount", "scraper", "-n", "default")


# ── Pods ────────────────────────────────────────────────────────────────────────────────────────


def test_a_deployment_is_spread_over_hosts(fleet: Fleet) -> None:
    with fleet.namespace() as namespace:
        fleet.control.apply(deployment("web", namespace, 4, topologySpreadConstraints=SPREAD, affinity=without_real()))
        pods = fleet.wait_running(namespace, 4)
        assert sorted(places(pods).values()) == [2, 2]
        wide = fleet.control.kubectl("get", "pods", "-n", namespace, "-o", "wide")
        for each in pods:
            [instance] = fleet.host(each["spec"]["nodeName"]).instances(pod_uid=each["metadata"]["uid"])
            assert each["status"]["podIP"] == instance["network"]["ip"]
            assert instance["network"]["ip"] in wide


def test_a_deployment_of_six_is_on_three_hosts(fleet: Fleet) -> None:
    """Two on each, also on the one whose VMs are real."""
    with fleet.namespace() as namespace:
        fleet.control.apply(deployment("web", namespace, 6, topologySpreadConstraints=SPREAD))
        pods = fleet.wait_running(namespace, 6)
        assert places(pods) == {host.name: 2 for host in fleet.hosts}
        wide = fleet.control.kubectl("get", "pods", "-n", namespace, "-o", "wide").splitlines()[1:]
        shown = {(line.split()[6], line.split()[5]) for line in wide}
        assert shown == {(each["spec"]["nodeName"], each["status"]["podIP"]) for each in pods}


def test_more_than_a_host_has_stays_pending(fleet: Fleet) -> None:
    """The scheduler counts with the node's figures, the VMM's share included."""
    host = fleet.fakes[0]
    cpus = host.ask("GET", "/resources")["cpu"]["effective_limit"]
    fitting = int(cpus / 12.05)
    with fleet.namespace() as namespace:
        large = {"resources": resources(cpu="12")}
        fleet.control.apply(*(pod(f"p{n}", namespace, node=host.name, container=large) for n in range(fitting + 1)))
        fleet.wait_running(namespace, fitting)
        [waiting] = [each for each in fleet.pods(namespace) if not is_running(each)]
        assert waiting["status"]["phase"] == "Pending" and "nodeName" not in waiting["spec"]


def test_what_cannot_be_done_is_refused_by_name(fleet: Fleet) -> None:
    with fleet.namespace() as namespace:
        two = pod("two", namespace)
        two["spec"]["containers"].append({**two["spec"]["containers"][0], "name": "second"})
        fleet.control.apply(two, pod("host", namespace, hostNetwork=True))
        for words in ("spec.containers", "spec.hostNetwork"):
            eventually(lambda words=words: [each for each in events(fleet, namespace) if words in each], words)  # type: ignore[misc]


def test_two_pods_of_one_name_are_two_instances(fleet: Fleet) -> None:
    """In two namespaces at once, and one after another in one."""
    host = fleet.fakes[0]
    with fleet.namespace() as first, fleet.namespace() as second:
        fleet.control.apply(pod("same", first, node=host.name), pod("same", second, node=host.name))
        uids = {fleet.wait_running(each, 1)[0]["metadata"]["uid"] for each in (first, second)}
        fleet.control.kubectl("delete", "pod", "same", "-n", first, "--wait=false")
        eventually(lambda: not fleet.control.try_kubectl("get", "pod", "same", "-n", first).stdout, "it is gone")
        fleet.control.apply(pod("same", first, node=host.name))
        uids.add(fleet.wait_running(first, 1)[0]["metadata"]["uid"])
        assert len(uids) == 3
        here = [each for namespace in (first, second) for each in in_namespace(host, namespace)]
        assert {each["tags"]["kubernetes.io/pod-uid"] for each in here} <= uids
        assert len(here) == 2


def test_statistics_are_reported_to_the_cluster(fleet: Fleet) -> None:
    """Through the API server's proxy, as monitoring reads them; `kubectl top` is in test_top.py."""
    host = fleet.fakes[0]
    with fleet.namespace() as namespace:
        fleet.control.apply(pod("busy", namespace, node=host.name))
        fleet.wait_running(namespace, 1)
        metrics = fleet.control.kubectl("get", "--raw", f"/api/v1/nodes/{host.name}/proxy/metrics/resource")
        assert "node_cpu_usage_seconds_total" in metrics
        summary = json.loads(fleet.control.kubectl("get", "--raw", f"/api/v1/nodes/{host.name}/proxy/stats/summary"))
        assert summary["node"]["memory"]["usageBytes"] > 0
        assert [each for each in summary["pods"] if each["podRef"]["namespace"] == namespace]


# ── Devices ─────────────────────────────────────────────────────────────────────────────────────

GPU, VGPU = f"hypeman.dev/gpu-{GPU_CLASS}", "hypeman.dev/vgpu-t4-1q"


@pytest.fixture
def gpus(fleet: Fleet) -> Iterator[None]:
    """Registered on the two hosts with made-up ones, and known to the cluster."""
    for host in fleet.fakes:
        for address in GPUS:
            host.ask("POST", "/devices", {"pci_address": address})

    def counted(amount: str) -> bool:
        known = (fleet.control.get("node", host.name)["status"]["allocatable"] for host in fleet.fakes)
        return all(each.get(GPU, "0") == amount for each in known)

    eventually(lambda: counted("2"), "the nodes have them")
    yield
    for host in fleet.fakes:
        for device in host.ask("GET", "/devices"):
            host.ask("DELETE", f"/devices/{device['id']}")
    eventually(lambda: counted("0"), "the nodes have them no longer")


def test_devices_go_to_as_many_pods_as_there_are(fleet: Fleet, gpus: None) -> None:
    """The scheduler counts them; the host chooses which one, and no two pods have the same."""

    def attached() -> int:
        return sum(device["attached_to"] is not None for host in fleet.fakes for device in host.ask("GET", "/devices"))

    with fleet.namespace() as namespace:
        fleet.control.apply(
            deployment("gpu", namespace, 5, container={"resources": resources(**{GPU: "1"})}),
        )
        assert sorted(places(fleet.wait_running(namespace, 4)).values()) == [2, 2]
        assert attached() == 4
        [waiting] = [each for each in fleet.pods(namespace) if not is_running(each)]
        [scheduled] = [each for each in waiting["status"]["conditions"] if each["type"] == "PodScheduled"]
        assert f"Insufficient {GPU}" in scheduled["message"]
        described = fleet.control.kubectl("describe", "node", fleet.fakes[0].name)
        assert re.search(rf"{GPU}\s+2\s+2", described), described
        fleet.control.kubectl("scale", "deployment", "gpu", "-n", namespace, "--replicas=1")
        eventually(lambda: attached() == 1, "the others are free again")
        fleet.control.kubectl("scale", "deployment", "gpu", "-n", namespace, "--replicas=4")
        fleet.wait_running(namespace, 4)
        assert attached() == 4


def test_a_vgpu_is_a_mediated_device_of_the_host(fleet: Fleet) -> None:
    host = fleet.fakes[0]
    with fleet.namespace() as namespace:
        wanted = {"resources": resources(**{VGPU: "1"})}
        fleet.control.apply(*(pod(f"v{number}", namespace, node=host.name, container=wanted) for number in range(3)))
        fleet.wait_running(namespace, 2)
        assert {each["gpu"]["profile"] for each in in_namespace(host, namespace)} == {PROFILE}
        assert len({each["gpu"]["mdev_uuid"] for each in in_namespace(host, namespace)}) == 2
        [waiting] = [each for each in fleet.pods(namespace) if not is_running(each)]
        assert "nodeName" not in waiting["spec"], "a host has two of them"
        assert fleet.control.get("node", host.name)["status"]["capacity"][VGPU] == "2", "used ones count"


# ── Faults ──────────────────────────────────────────────────────────────────────────────────────


def test_a_host_that_ends_is_replaced_and_cleans_up(fleet: Fleet) -> None:
    victim = fleet.fakes[0]
    with fleet.namespace() as namespace:
        fleet.control.apply(
            deployment(
                "web", namespace, 4, topologySpreadConstraints=[], tolerations=gone_after(3), affinity=without_real()
            )
        )
        fleet.wait_running(namespace, 4)
        victim.power_off()
        began = time.monotonic()

        def moved() -> bool:
            pods = [each for each in fleet.pods(namespace) if is_running(each)]
            return len(pods) == 4 and victim.name not in places(pods)

        eventually(moved, "all run elsewhere")
        print(f"all run elsewhere {time.monotonic() - began:.1f} s after the end of a host (grace {GRACE_SECONDS} s)")
        for each in fleet.control.get("pods", "-n", namespace)["items"]:
            if each["spec"]["nodeName"] == victim.name:  # so the host will never see it again
                name = each["metadata"]["name"]
                fleet.control.kubectl("delete", "pod", name, "-n", namespace, "--force", "--grace-period=0")
        victim.start_server()
        victim.start_node()
        fleet.wait_ready(victim)
        alive = {each["metadata"]["uid"] for each in fleet.pods(namespace)}
        eventually(
            lambda: {each["tags"]["kubernetes.io/pod-uid"] for each in in_namespace(victim, namespace)} <= alive,
            "its orphans are gone", victim.node,
        )  # fmt: skip


@pytest.mark.parametrize(("policy", "state"), [("standby", "Standby"), ("stop", "Stopped"), ("keep", "Running")])
def test_a_partition_leaves_no_pod_twice_but_where_it_may(fleet: Fleet, policy: str, state: str) -> None:
    """The host ends its VMs by itself; when the link is back, what the cluster gave away is removed."""
    victim = fleet.fakes[0]
    with fleet.namespace() as namespace:
        template = {"annotations": {"hypeman.dev/fencing": policy}}
        spec = {"tolerations": gone_after(3), "affinity": without_real(), "topologySpreadConstraints": PREFERRED}
        fleet.control.apply(deployment("web", namespace, 2, template=template, **spec))
        fleet.wait_running(namespace, 2)
        fleet.control.kubectl("scale", "deployment", "web", "-n", namespace, "--replicas=4")
        pods = fleet.wait_running(namespace, 4)
        assert places(pods)[victim.name], "pods of one app are spread where that is possible"
        victim.cut(True)
        try:
            fenced = f"the VMs are {state} after {FENCE_SECONDS} s and the toleration"
            eventually(lambda: all(each["state"] == state for each in in_namespace(victim, namespace)), fenced)
            if policy == "keep":
                time.sleep(FENCE_SECONDS + 5)
                assert all(each["state"] == "Running" for each in in_namespace(victim, namespace))

            def moved() -> bool:
                running = [each for each in fleet.pods(namespace) if is_running(each)]
                return len(running) == 4 and victim.name not in places(running)

            eventually(moved, "all run elsewhere")
            if policy != "keep":
                assert max(fleet.running_by_uid().values()) == 1
                assert sum(len([one for one in in_namespace(host, namespace) if one["state"] == "Running"])
                           for host in fleet.hosts) == 4  # fmt: skip
        finally:
            victim.cut(False)
        fleet.wait_ready(victim)
        eventually(lambda: not in_namespace(victim, namespace), "what was given away is removed", victim.node)


def test_a_drain_leaves_nothing_and_respects_budgets(fleet: Fleet) -> None:
    victim, other = fleet.fakes
    with fleet.namespace() as namespace:
        fleet.control.apply(
            deployment("web", namespace, 3, affinity=without_real()),
            {
                "apiVersion": "policy/v1",
                "kind": "PodDisruptionBudget",
                "metadata": {"name": "web", "namespace": namespace},
                "spec": {"minAvailable": 2, "selector": {"matchLabels": {"app": "web"}}},
            },
        )
        fleet.wait_running(namespace, 3)
        try:
            fewest = 3
            drain = ["drain", victim.name, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s"]
            with subprocess.Popen(
                fleet.control.command(*drain), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as process:
                while process.poll() is None:
                    fewest = min(fewest, len([each for each in fleet.pods(namespace) if is_running(each)]))
                    time.sleep(0.1)
                assert process.stdout is not None
                assert process.returncode == 0, process.stdout.read()
            assert fewest >= 2
            eventually(lambda: not in_namespace(victim, namespace), "nothing is left", victim.node)
            assert set(places(fleet.wait_running(namespace, 3))) == {other.name}
        finally:
            fleet.control.kubectl("uncordon", victim.name)


def test_a_node_program_that_is_replaced_changes_nothing(fleet: Fleet) -> None:
    """Killed, and a new one started, host by host: the same instances, no restarts."""
    with fleet.namespace() as namespace:
        fleet.control.apply(deployment("web", namespace, 4, affinity=without_real()))
        before = fleet.wait_running(namespace, 4)
        ids = {each["id"] for host in fleet.fakes for each in in_namespace(host, namespace)}
        for host in fleet.fakes:
            host.node.end(kill=True)
            host.start_node()
        for host in fleet.fakes:
            fleet.wait_ready(host)
        time.sleep(5)
        after = fleet.wait_running(namespace, 4)
        assert {each["metadata"]["uid"] for each in after} == {each["metadata"]["uid"] for each in before}
        assert {each["id"] for host in fleet.fakes for each in in_namespace(host, namespace)} == ids
        assert {each["status"]["containerStatuses"][0]["restartCount"] for each in after} == {0}


def test_pods_keep_running_without_an_api_server(fleet: Fleet) -> None:
    """Longer than the nodes' grace, shorter than the pods' toleration: the cluster comes back to what it had. It no
    longer knows what changed after the versions that the nodes have seen (410), and they list again."""
    with fleet.namespace() as namespace:
        fleet.control.apply(deployment("web", namespace, 3, affinity=without_real(), tolerations=gone_after(300)))
        before = fleet.wait_running(namespace, 3)
        ids = {each["id"] for host in fleet.fakes for each in in_namespace(host, namespace)}
        seen = json.loads(fleet.control.kubectl("get", "--raw", "/api/v1/pods"))["metadata"]["resourceVersion"]
        time.sleep(GRACE_SECONDS)  # heartbeats are further versions
        fleet.control.apiserver.end(kill=True)
        time.sleep(60)
        assert {
            each["id"] for host in fleet.fakes for each in in_namespace(host, namespace) if each["state"] == "Running"
        } == ids
        fleet.control.start_apiserver()
        for host in fleet.hosts:
            fleet.wait_ready(host)
        after = fleet.wait_running(namespace, 3)
        assert {each["metadata"]["uid"] for each in after} == {each["metadata"]["uid"] for each in before}
        watch = f"/api/v1/pods?watch=1&resourceVersion={seen}&timeoutSeconds=1"
        assert '"code":410' in fleet.control.kubectl("get", "--raw", watch)
        fleet.control.kubectl("scale", "deployment", "web", "-n", namespace, "--replicas=5")
        fleet.wait_running(namespace, 5)


@pytest.mark.parametrize(("offset", "word"), [("+2h", "ahead of"), ("+3d", "ahead of"), ("-3d", "behind")])
def test_a_node_whose_clock_is_off_stays_a_node(fleet: Fleet, offset: str, word: str) -> None:
    """It says so and works. Set right: its heartbeats still count, although they may come from the past."""
    victim = fleet.fakes[0]

    def ready_for(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert fleet.condition(victim, "Ready") == "True"
            time.sleep(0.5)

    with fleet.namespace() as namespace:
        fleet.control.apply(pod("before", namespace, node=victim.name))
        fleet.wait_running(namespace, 1)
        [instance] = in_namespace(victim, namespace)
        victim.node.end()
        victim.start_node(**victim.other_clock(offset))
        try:
            eventually(lambda: fleet.condition(victim, "ClockSkewed") == "True", "the condition is set", victim.node)
            assert f"{word} the API server's" in fleet.control.kubectl("describe", "node", victim.name)
            fleet.control.apply(pod("meanwhile", namespace, node=victim.name))
            fleet.wait_running(namespace, 2)
            healthy = fleet.control.kubectl("get", "--raw", f"/api/v1/nodes/{victim.name}/proxy/healthz")
            assert healthy == "ok", "its API and the API server take each other's certificates"
        finally:
            victim.node.end()
            victim.start_node()
        eventually(lambda: fleet.condition(victim, "ClockSkewed") == "False", "it agrees again", victim.node)
        ready_for(2 * GRACE_SECONDS)
        after = fleet.wait_running(namespace, 2)
        assert {each["status"]["containerStatuses"][0]["restartCount"] for each in after} == {0}
        assert instance["id"] in {each["id"] for each in in_namespace(victim, namespace)}


@pytest.fixture
def newcomer(fleet: Fleet) -> Iterator[Host]:
    """A fourth host, which has not joined."""
    for directory in short_directory("late"):
        directory.chmod(0o755)
        host = Host(fleet.control, directory, 4)
        try:
            yield host
        finally:
            host.close()
            fleet.control.kubectl("delete", "node", host.name, "--ignore-not-found")


def says(host: Host, *words: str) -> None:
    """The node program, in its log."""
    eventually(lambda: all(each in host.node.log.read_text() for each in words), " … ".join(words), host.node)


def test_a_host_whose_clock_is_ahead_joins(fleet: Fleet, newcomer: Host) -> None:
    clock = newcomer.other_clock("+3d")
    newcomer.start_server(**clock)
    newcomer.import_image()
    newcomer.join(**clock)
    fleet.wait_ready(newcomer)
    fleet.approve_serving(newcomer)
    assert fleet.condition(newcomer, "ClockSkewed") == "True"
    with fleet.namespace() as namespace:
        fleet.control.apply(pod("early", namespace, node=newcomer.name))
        fleet.wait_running(namespace, 1)


def test_a_host_whose_clock_is_behind_says_why_it_cannot_join_yet(fleet: Fleet, newcomer: Host) -> None:
    """Its token has ended before it was made. With the clock set and another token it joins."""
    clock = newcomer.other_clock("-3d")
    newcomer.start_server(**clock)
    newcomer.join(**clock)
    says(newcomer, "the bootstrap token has ended", "s behind the API server's")
    newcomer.node.end()
    newcomer.join()
    fleet.wait_ready(newcomer)


@pytest.mark.parametrize(("offset", "word"), [("+30d", "certificate has expired"), ("-30d", "is not yet valid")])
def test_a_host_that_takes_the_clusters_certificate_for_invalid_says_what_time_it_is(
    fleet: Fleet, newcomer: Host, offset: str, word: str
) -> None:
    newcomer.start_server()
    newcomer.join(**newcomer.other_clock(offset))
    believed = datetime.now(UTC) + timedelta(days=int(offset.removesuffix("d")))
    says(newcomer, word, f"by this host's clock, at which it is {believed:%Y-%m-}")


def test_a_server_that_does_not_answer_sends_no_heartbeat(fleet: Fleet) -> None:
    """A node without its server is no node; when it answers again, nothing has changed."""
    victim = fleet.fakes[0]
    victim.server.signal(signal.SIGSTOP)
    try:
        eventually(lambda: fleet.condition(victim, "Ready") != "True", "the node counts as gone")
    finally:
        victim.server.signal(signal.SIGCONT)
    fleet.wait_ready(victim)


# ── Volumes ─────────────────────────────────────────────────────────────────────────────────────


def test_a_claim_is_a_volume_of_the_host_that_was_chosen(fleet: Fleet) -> None:
    with fleet.namespace() as namespace:
        claim = {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data", "namespace": namespace},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "hypeman-local",
                     "resources": {"requests": {"storage": "1Gi"}}},
        }  # fmt: skip
        mounted = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
        volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
        user = pod("db", namespace, container=mounted, volumes=volumes, affinity=without_real())
        fleet.control.apply(claim, user)
        [first] = fleet.wait_running(namespace, 1)
        host = fleet.host(first["spec"]["nodeName"])
        bound = fleet.control.get("pvc", "data", "-n", namespace)["spec"]["volumeName"]
        assert [each for each in host.ask("GET", "/volumes") if each["id"] == bound]
        fleet.control.kubectl("delete", "pod", "db", "-n", namespace)
        fleet.control.apply(user)
        [second] = fleet.wait_running(namespace, 1)
        assert second["spec"]["nodeName"] == host.name, "the data is there"
        fleet.control.kubectl("delete", "pod", "db", "-n", namespace)
        fleet.control.kubectl("delete", "pvc", "data", "-n", namespace)
        eventually(
            lambda: not [each for each in host.ask("GET", "/volumes") if each["id"] == bound], "the volume is gone"
        )


# ── Sandboxes ───────────────────────────────────────────────────────────────────────────────────

SANDBOXES = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "sandboxes.agents.x-k8s.io",
        "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/agent-sandbox"},
    },
    "spec": {
        "group": "agents.x-k8s.io",
        "scope": "Namespaced",
        "names": {"plural": "sandboxes", "singular": "sandbox", "kind": "Sandbox"},
        "versions": [
            {
                "name": "v1alpha1", "served": True, "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}  # fmt: skip
"""The kind alone: what its controller does with pods, these tests do."""


def test_a_suspended_sandbox_keeps_its_memory_until_it_is_gone(fleet: Fleet) -> None:
    fleet.control.apply(SANDBOXES)
    fleet.control.kubectl("wait", "--for=condition=Established", "crd/sandboxes.agents.x-k8s.io", "--timeout=60s")
    host = fleet.fakes[0]
    with fleet.namespace() as namespace:
        about = {"name": "agent", "namespace": namespace}
        fleet.control.apply({"apiVersion": "agents.x-k8s.io/v1alpha1", "kind": "Sandbox", "metadata": about})
        uid = fleet.control.get("sandbox", "agent", "-n", namespace)["metadata"]["uid"]
        body = pod("agent", namespace, node=host.name)
        owner = {
            "apiVersion": "agents.x-k8s.io/v1alpha1",
            "kind": "Sandbox",
            "name": "agent",
            "uid": uid,
            "controller": True,
        }
        body["metadata"]["ownerReferences"] = [owner]
        fleet.control.apply(body)
        fleet.wait_running(namespace, 1)
        [first] = in_namespace(host, namespace)

        fleet.control.kubectl("delete", "pod", "agent", "-n", namespace)  # suspended
        [asleep] = in_namespace(host, namespace)
        assert (asleep["id"], asleep["state"]) == (first["id"], "Standby")

        fleet.control.apply(body)  # resumed
        [running] = fleet.wait_running(namespace, 1)
        [awake] = in_namespace(host, namespace)
        assert (awake["id"], awake["state"]) == (first["id"], "Running")
        assert awake["tags"]["kubernetes.io/pod-uid"] == running["metadata"]["uid"]

        fleet.control.kubectl("delete", "sandbox", "agent", "-n", namespace)
        eventually(lambda: not in_namespace(host, namespace), "the VM goes with its Sandbox", host.node)


def test_members_of_a_pool_are_forks(fleet: Fleet) -> None:
    """Booted once on the host, then forked for each pod."""
    host = fleet.fakes[0]
    with fleet.namespace() as namespace:
        template = {"annotations": {"hypeman.dev/golden": "true"}}
        fields = {"automountServiceAccountToken": False, "node": host.name}
        fleet.control.apply(deployment("pool", namespace, 4, template=template, **fields))
        fleet.wait_running(namespace, 4)
        assert len(in_namespace(host, namespace)) >= 4
