"""metrics-server beside the control plane: what `kubectl top` and the horizontal pod autoscaler ask.

It has the rights of upstream's manifest, not an administrator's: a service account reads ``/metrics/resource`` of the
nodes with its token. It verifies the nodes' certificates, and the API server verifies its own.
"""

from __future__ import annotations

from typing import Any

from tests.fleet.control import ADDRESS, ControlPlane, Program, eventually

NAME, NAMESPACE = "metrics-server", "kube-system"
PORT = 4443
API = "v1beta1.metrics.k8s.io"
RESOLUTION_SECONDS = 10
"""Between two looks at the nodes; the least that it accepts."""
_RBAC = "rbac.authorization.k8s.io"

Object = dict[str, Any]


class MetricsServer:
    def __init__(self, control: ControlPlane) -> None:
        self._control = control
        control.authority.issue(NAME, NAME, addresses=(ADDRESS,), hosts=(f"{NAME}.{NAMESPACE}.svc",))
        self.program = Program(NAME, control.namespace, control.directory)

    def __enter__(self) -> MetricsServer:
        """Once the API server passes questions on to it."""
        control, directory = self._control, self._control.directory
        control.apply(*objects(control.encoded("ca.pem")))
        token = control.kubectl("create", "token", NAME, "-n", NAMESPACE, "--duration=6h").strip()
        control.write_kubeconfig(NAME, {"token": token})
        file = f"{directory}/{NAME}.conf"
        self.program.start(
            *control.program(NAME),
            f"--kubeconfig={file}",
            f"--authentication-kubeconfig={file}",
            f"--authorization-kubeconfig={file}",
            f"--bind-address={ADDRESS}",
            f"--secure-port={PORT}",
            f"--tls-cert-file={directory}/{NAME}.pem",
            f"--tls-private-key-file={directory}/{NAME}.key",
            f"--kubelet-certificate-authority={directory}/ca.pem",
            "--kubelet-preferred-address-types=InternalIP",
            "--kubelet-use-node-status-port",
            f"--kubelet-request-timeout={RESOLUTION_SECONDS - 2}s",
            f"--metric-resolution={RESOLUTION_SECONDS}s",
        )
        try:
            eventually(self._is_available, "the API server reaches metrics-server", self.program)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Its API goes first: namespaces cannot be deleted while one does not answer."""
        self._control.kubectl("delete", "apiservice", API)
        self.program.end()

    def _is_available(self) -> bool:
        conditions = self._control.get("apiservice", API)["status"].get("conditions", ())
        return any((each["type"], each["status"]) == ("Available", "True") for each in conditions)


def objects(authorities: str) -> list[Object]:
    """What the cluster needs; ``authorities``: base64 of the CA of its certificate."""
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}
    role = f"system:{NAME}"
    port: Object = {"name": "https", "protocol": "TCP", "port": PORT}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME, "namespace": NAMESPACE}},
        {
            "apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": {"name": role},
            "rules": [
                {"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["pods", "nodes"], "verbs": ["get", "list", "watch"]},
            ],
        },
        _binding("ClusterRoleBinding", role, "ClusterRole", role, account),
        _binding("ClusterRoleBinding", f"{NAME}:auth-delegator", "ClusterRole", "system:auth-delegator", account),
        _binding("RoleBinding", f"{NAME}:auth-reader", "Role", "extension-apiserver-authentication-reader", account),
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": {"ports": [{"name": "https", "protocol": "TCP", "port": 443, "targetPort": PORT}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "ports": [port],
            "metadata": {
                "name": NAME, "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": NAME},
            },
            "endpoints": [{"addresses": [ADDRESS], "conditions": {"ready": True}}],
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": API},
            "spec": {
                "group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
                "service": {"name": NAME, "namespace": NAMESPACE}, "caBundle": authorities,
            },
        },
    ]  # fmt: skip


def _binding(kind: str, name: str, role_kind: str, role: str, subject: Object) -> Object:
    where = {"namespace": NAMESPACE} if kind == "RoleBinding" else {}
    return {
        "apiVersion": f"{_RBAC}/v1", "kind": kind, "metadata": {"name": name, **where},
        "roleRef": {"apiGroup": _RBAC, "kind": role_kind, "name": role}, "subjects": [subject],
    }  # fmt: skip
