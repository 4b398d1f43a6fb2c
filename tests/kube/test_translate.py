"""From a pod's fields to the request for its instance."""

from __future__ import annotations

import base64
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.ids import check_name, check_tags
from hypeman.kube import names
from hypeman.kube.materials import logins_of
from hypeman.kube.podspec import Refusal, notes_of, parse_pod
from hypeman.kube.quantity import BadQuantity, parse_quantity, whole
from hypeman.kube.references import MAX_FILES, Sources, expand
from hypeman.kube.translate import Placement, facts_of, spec_digest, tags_of, tolerates, translate
from hypeman.kube.types import ConfigMap, ObjectMeta, OwnerReference, Pod, Secret
from tests.kube.world import pod as raw_pod


def made(name: str = "web", **fields: Any) -> Pod:
    raw = raw_pod(**fields)
    raw["metadata"] |= {"name": name, "namespace": "default", "uid": "12345678-aaaa"}
    return msgspec.convert(raw, Pod)


def request(pod: Pod, placement: Placement | None = None) -> Any:
    spec = parse_pod(pod.spec)
    return translate(pod, spec, facts_of(pod, spec, "here", "192.0.2.7"), Sources(), placement or Placement()).request


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", "0.5"), ("1Gi", 1 << 30), ("1e3", 1000), ("1.5Ki", 1536), (2, 2), ("1E", 10**18), ("3u", "0.000003")],
)
def test_quantities(text: str | int, value: str | int) -> None:
    assert parse_quantity(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "1 Gi", "Gi", "1e99", "0x10", "1KB", "-", "9" * 65])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(BadQuantity):
        parse_quantity(text)


def test_a_quantity_is_rounded_up() -> None:
    assert whole("1500m") == 2


@given(st.text(max_size=300), st.uuids())
def test_names_and_tags_are_legal_whatever_the_pod_is_called(name: str, uid: Any) -> None:
    owner = OwnerReference("apps/v1", "ReplicaSet", "r" * 200, "u", controller=True)
    found = Pod(metadata=ObjectMeta(name=name, namespace="n" * 63, uid=str(uid), owner_references=(owner,)))
    check_name(names.instance_name(found))
    legal = msgspec.structs.replace(found, metadata=msgspec.structs.replace(found.metadata, name="p" * 253))
    tags = tags_of(legal, parse_pod(raw_pod()["spec"]), "here")
    assert check_tags(tags) == tags
    assert names.owner_of(tags) == msgspec.structs.replace(owner, controller=False)


def test_variables_are_expanded_like_a_kubelet() -> None:
    assert expand("$(A)-$$(A)-$(B)-$A", {"A": "x"}) == "x-$(A)-$(B)-$A"


def test_security_ports_probes_and_storage() -> None:
    container = {
        "securityContext": {"runAsUser": 1000},
        "ports": [{"name": "http", "containerPort": 80, "hostPort": 8080, "protocol": "TCP"}],
        "livenessProbe": {"httpGet": {"port": "http", "path": "/live", "scheme": "HTTP"}, "periodSeconds": 5},
        "startupProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 2, "failureThreshold": 30},
        "resources": {"limits": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "2Gi"}},
    }
    found = request(
        made(container=container, securityContext={"runAsGroup": 2000, "sysctls": [{"name": "net.a", "value": "1"}]})
    )
    assert (found.user, found.vcpus, found.size, found.overlay_size) == ("1000:2000", 1, str(1 << 30), str(2 << 30))
    assert (found.ports[0].host_port, found.ports[0].guest_port) == (8080, 80)
    check = found.health_check
    assert (check.http.port, check.http.path, check.interval, check.start_period) == (80, "/live", "5s", "60s")
    assert found.tags["hypeman.sysctl.net.a"] == "1"


@pytest.mark.parametrize(
    ("resource", "divisor", "value"),
    [
        ("limits.cpu", "1m", "500"),
        ("limits.cpu", "0", "1"),
        ("requests.cpu", "1m", "250"),
        ("limits.memory", "1Mi", "1024"),
        ("requests.memory", "1Mi", "64"),
        ("limits.ephemeral-storage", "1Gi", "2"),
    ],
)
def test_resources_in_the_environment_are_those_of_the_pod(resource: str, divisor: str, value: str) -> None:
    """As declared, not the VM's size, whose vCPUs are whole ones."""
    resources = {
        "limits": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "2Gi"},
        "requests": {"cpu": "250m", "memory": "64Mi"},
    }
    ref = {"resourceFieldRef": {"resource": resource, "divisor": divisor, "containerName": "main"}}
    found = request(made(container={"resources": resources, "env": [{"name": "A", "valueFrom": ref}]}))
    assert found.env == {"A": value}
    of_another = {"resourceFieldRef": {**ref["resourceFieldRef"], "containerName": "other"}}
    with pytest.raises(Refusal, match="'other'"):
        request(made(container={"resources": resources, "env": [{"name": "A", "valueFrom": of_another}]}))


def test_resources_that_are_not_declared_are_the_vms() -> None:
    def value(resource: str) -> str:
        ref = {"resourceFieldRef": {"resource": resource, "divisor": "0"}}
        return str(request(made(container={"env": [{"name": "A", "valueFrom": ref}]})).env["A"])

    assert (value("limits.memory"), value("requests.memory")) == (str(1 << 30), "0")
    with pytest.raises(Refusal, match="ephemeral-storage"):
        value("limits.ephemeral-storage")


def test_credentials_stay_out_of_the_guest() -> None:
    rules = (
        b'{"KEY": {"source": {"env": "REAL"}, "inject": [{"as": {"header": "Authorization", "format": "${value}"}}]}}'
    )
    data = {"credentials.json": base64.b64encode(rules).decode(), "REAL": base64.b64encode(b"hunter2").decode()}
    secret = Secret(metadata=ObjectMeta(name="keys", resource_version="7"), data=data)
    found = request(made(), Placement(credentials=secret))
    assert found.env == {"REAL": "hunter2"}, "the server keeps values that credentials name on the host"
    assert found.credentials["KEY"].source.env == "REAL" and found.network.egress.enabled
    assert found.tags[names.CREDENTIALS] == "7"
    lacking = {"credentials.json": data["credentials.json"]}
    with pytest.raises(Refusal, match="REAL"):
        request(made(), Placement(credentials=Secret(data=lacking)))


def test_credentials_of_the_host_are_not_the_pods() -> None:
    """Those that its administrator configured by name; pods are made by anyone in the cluster."""
    rules = b'{"KEY": {"source": {"named": "github"}, "inject": [{"as": {"header": "A", "format": "${value}"}}]}}'
    secret = Secret(data={"credentials.json": base64.b64encode(rules).decode()})
    with pytest.raises(Refusal, match="KEY"):
        request(made(), Placement(credentials=secret))


def test_files_of_a_volume_are_bounded() -> None:
    """A small spec can name one key thousands of times."""
    items = [{"key": "big", "path": f"f{number}"} for number in range(MAX_FILES // 1_000_000 + 1)]
    pod = made(
        container={"volumeMounts": [{"name": "c", "mountPath": "/c"}]},
        volumes=[{"name": "c", "configMap": {"name": "c", "items": items}}],
    )
    spec = parse_pod(pod.spec)
    sources = Sources(config_maps={"c": ConfigMap(data={"big": "x" * 1_000_000})})
    with pytest.raises(Refusal, match="'c'"):
        translate(pod, spec, facts_of(pod, spec, "here", "192.0.2.7"), sources, Placement())


@pytest.mark.parametrize(
    ("tolerations", "seconds"),
    [
        ([], "0"),
        ([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 3}], "3"),
        ([{"operator": "Exists"}], "forever"),
        ([{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}], "0"),
    ],
)  # fmt: skip
def test_how_long_a_pod_stays_with_a_silent_node(tolerations: list[Any], seconds: str) -> None:
    assert tolerates(parse_pod(raw_pod(tolerations=tolerations)["spec"])) == seconds


def test_saved_memory_fits_a_later_pod_of_the_same_template_only() -> None:
    def with_token(suffix: str, **fields: Any) -> Pod:
        name = f"kube-api-access-{suffix}"
        mount = {"name": name, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
        return made(container={"volumeMounts": [mount], **fields}, volumes=[{"name": name, "projected": {}}])

    assert spec_digest(with_token("aaaaa")) == spec_digest(with_token("bbbbb"))
    assert spec_digest(with_token("aaaaa")) != spec_digest(with_token("bbbbb", image="nginx:2"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"securityContext": {"fsGroup": 1}}, "spec.securityContext.fsGroup"),
        ({"securityContext": {"runAsNonRoot": True}}, "runAsNonRoot"),
        ({"container": {"livenessProbe": {"grpc": {"port": 1}}}}, "livenessProbe.grpc"),
        ({"container": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}, "nvidia.com/gpu"),
        ({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}, "spec.volumes[0].hostPath"),
        ({"volumes": [{"name": "h", "emptyDir": {"medium": "Memory"}}]}, "emptyDir.medium"),
        ({"container": {"volumeMounts": [{"name": "x", "mountPath": "/x", "subPath": "a"}]}}, "subPath"),
        ({"dnsConfig": {"nameservers": ["1.1.1.1"]}}, "spec.dnsConfig"),
        ({"dnsPolicy": "None"}, "spec.dnsPolicy"),
        ({"volumes": [{"name": "h"}]}, "spec.volumes[0]"),
        ({"container": {"resources": {"limits": {"hypeman.dev/other": "1"}}}}, "hypeman.dev/other"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_pod(raw_pod(**fields)["spec"])
    assert named in str(refused.value)


def test_what_asks_for_nothing_is_accepted() -> None:
    """As the API server fills in."""
    spec = raw_pod(
        hostNetwork=False, securityContext={}, enableServiceLinks=True, serviceAccountName="default",
        preemptionPolicy="PreemptLowerPriority", priority=0, hostIPC=False, shareProcessNamespace=False,
    )["spec"]  # fmt: skip
    assert parse_pod(spec).container.image == "nginx:alpine"
    assert not notes_of(spec)


def test_logins_are_for_their_registry() -> None:
    auths = {
        "registry.example.com": {"username": "a", "password": "b"},
        "https://index.docker.io/v1/": {"auth": "YzpkOmU="},
    }
    data = {".dockerconfigjson": base64.b64encode(msgspec.json.encode({"auths": auths})).decode()}
    secret = Secret(data=data)
    assert [(each.username, each.password) for each in logins_of(secret, "nginx")] == [("c", "d:e")]
    assert [each.username for each in logins_of(secret, "registry.example.com/x/y:1")] == ["a"]
    assert logins_of(secret, "other.io/x") == []
    assert logins_of(Secret(data={".dockerconfigjson": "e30="}), "nginx") == []
