"""A control plane with its hosts, and the questions that tests ask it."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.fleet.control import ControlPlane, eventually
from tests.fleet.hosts import Host
from tests.real.appliance import IMAGE

SMALL = {"cpu": "100m", "memory": "128Mi"}


class Fleet:
    def __init__(self, control: ControlPlane, hosts: Sequence[Host]) -> None:
        self.control = control
        self.hosts = tuple(hosts)

    def start(self) -> None:
        """All hosts Ready, with certificates that the cluster has signed."""
        for host in self.hosts:
            host.start_server()
            host.import_image()
            host.join()
        for host in self.hosts:
            self.wait_ready(host)
            self.approve_serving(host)

    def host(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    @property
    def fakes(self) -> tuple[Host, ...]:
        return tuple(host for host in self.hosts if not host.real)

    def wait_ready(self, host: Host) -> None:
        eventually(lambda: self.condition(host, "Ready") == "True", f"{host.name} is Ready", host.node)

    def condition(self, host: Host, kind: str) -> str:
        found = self.control.get("node", host.name)["status"]["conditions"]
        return str(next(each["status"] for each in found if each["type"] == kind))

    def approve_serving(self, host: Host) -> None:
        """As an administrator does it, and until the node uses the certificate."""

        def approved() -> bool:
            for request in self.control.get("csr")["items"]:
                spec = request["spec"]
                if (
                    spec["username"] != f"system:node:{host.name}"
                    or spec["signerName"] != "kubernetes.io/kubelet-serving"
                ):
                    continue
                if not request["status"].get("conditions"):
                    self.control.kubectl("certificate", "approve", request["metadata"]["name"])
                if request["status"].get("certificate"):
                    return True
            return False

        eventually(approved, f"{host.name} has requested a serving certificate", host.node)
        path = f"/api/v1/nodes/{host.name}/proxy/healthz"
        eventually(lambda: self.control.kubectl("get", "--raw", path) == "ok", f"{host.name}'s API", host.node)

    @contextmanager
    def namespace(self) -> Iterator[str]:
        """A namespace of the cluster; deleted with everything in it, and the hosts have nothing left of it."""
        name = f"test-{secrets.token_hex(3)}"
        self.control.kubectl("create", "namespace", name)
        eventually(lambda: self.control.get("serviceaccount", "default", "-n", name), "the namespace is ready")
        yield name
        self.control.kubectl("delete", "namespace", name, "--wait=false")
        eventually(lambda: not self.control.try_kubectl("get", "namespace", name).stdout, f"{name} is gone")
        for host in self.hosts:
            eventually(lambda host=host: not in_namespace(host, name), f"{host.name} has nothing of {name}")  # type: ignore[misc]

    def pods(self, namespace: str, *selector: str) -> list[dict[str, Any]]:
        found = self.control.get("pods", "-n", namespace, *selector)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def wait_running(self, namespace: str, count: int, *selector: str) -> list[dict[str, Any]]:
        """The pods, once ``count`` of them run."""

        def running() -> list[dict[str, Any]]:
            pods = [pod for pod in self.pods(namespace, *selector) if is_running(pod)]
            assert len(pods) == count, f"{len(pods)} of {count} pods run"
            return pods

        return eventually(running, f"{count} pods run", *(host.node for host in self.hosts if host.node.runs))

    def running_by_uid(self) -> Counter[str]:
        """How many running instances each pod has, on all hosts that answer."""
        found: Counter[str] = Counter()
        for host in self.hosts:
            if host.server.runs:
                found.update(
                    each["tags"]["kubernetes.io/pod-uid"] for each in host.instances() if each["state"] == "Running"
                )
        return found


def in_namespace(host: Host, namespace: str) -> list[dict[str, Any]]:
    return host.instances(namespace=namespace)


def is_running(pod: dict[str, Any]) -> bool:
    statuses = pod["status"].get("containerStatuses", ())
    return pod["status"].get("phase") == "Running" and all(each["ready"] for each in statuses)


def pod(name: str, namespace: str, *, node: str = "", **spec: Any) -> dict[str, Any]:
    """A pod of one busybox that sleeps."""
    container = {"name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "resources": resources()}
    container |= spec.pop("container", {})
    placed = {"nodeSelector": {"kubernetes.io/hostname": node}} if node else {}
    body = {
        "runtimeClassName": "hypeman",
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        **placed,
        **spec,
    }
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": body}


def resources(**more: str) -> dict[str, Any]:
    return {"requests": {**SMALL, **more}, "limits": {**SMALL, **more}}


def deployment(
    name: str, namespace: str, replicas: int, *, template: dict[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    """``spec`` is of its pods."""
    inner = pod(name, namespace, **spec)
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels, **(template or {})}, "spec": inner["spec"]},
        },
    }


def gone_after(seconds: int) -> list[dict[str, Any]]:
    """Tolerations: how long a pod stays on a node that is gone."""
    return [
        {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}
        for key in ("not-ready", "unreachable")
    ]


def without_real() -> dict[str, Any]:
    """Affinity: not on the host whose VMs are real, where each takes its time."""
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["host3"]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
