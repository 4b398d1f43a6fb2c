"""Every field of a pod or claim that Kubernetes publishes is read, noted, harmless or refused: none is dropped.

golden/pod_schema.json   the published fields (``tests/kube/pod_schema.py``)
golden/pod_fields.txt    what becomes of each: the one in git, and what really happens
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hypeman.kube import podspec
from hypeman.kube.claims import ClaimSpec, what_is_wrong
from hypeman.kube.podspec import Kind, Noted, Part, PodSpec, Refusal, notes_of, parse_pod, read_fields
from hypeman.kube.references import Missing, Sources, needed
from hypeman.kube.translate import Placement, facts_of, translate
from hypeman.kube.types import ConfigMap, PersistentVolumeClaim, Pod, Secret, StorageClass
from tests.kube import pod_schema

GOLDEN = Path(__file__).parent / "golden" / "pod_fields.txt"
SCHEMA = pod_schema.load()
READ = "read"
Spec = dict[str, Any]


# ── What becomes of each field ──────────────────────────────────────────────────────────────────


CLAIM = "PersistentVolumeClaimSpec"


def fields() -> Iterator[tuple[str, str, str]]:
    """Path, published type, and what becomes of it; nothing below a field that is not read."""
    yield from _fields(pod_schema.ROOT, PodSpec, "spec")


def claim_fields() -> list[tuple[str, str, str]]:
    return list(_fields(CLAIM, ClaimSpec, "spec"))


def _fields(published: str, kind: type[Part], path: str) -> Iterator[tuple[str, str, str]]:
    read = read_fields(kind)
    for name, type_ in SCHEMA[published].items():
        element = type_.removeprefix("[]")
        below = f"{path}.{name}{'[]' if element != type_ else ''}"
        inner = read.get(name)
        if inner is not None and element in SCHEMA:
            yield from _fields(element, inner, below)
        else:
            yield below, type_, READ if name in read else _says(kind.others.get(name))


def _says(other: Kind | Noted | tuple[Any, ...] | None) -> str:
    match other:
        case None:
            return "refused"
        case Kind():
            return other.value
        case Noted():
            return f"noted: {other.why}"
        case _:
            return f"refused, but {', '.join(map(str, other))}"


def render() -> str:
    parts = {"A pod:": fields(), "A PersistentVolumeClaim of a StorageClass of ours:": claim_fields()}
    return "\n".join(
        "".join([f"{title}\n\n", *(f"{path}  {says}\n" for path, _, says in found)]) for title, found in parts.items()
    )


def test_golden_copy() -> None:
    """Look at the difference, then write the file again: ``python -m tests.kube.test_pod_fields``."""
    assert render() == GOLDEN.read_text()


def test_all_that_is_known_is_published() -> None:
    """A field that is misspelt here would be refused, or never seen."""

    def known(published: str, kind: type[Part]) -> Iterator[str]:
        read = read_fields(kind)
        yield from (f"{published}.{name}" for name in {*read, *kind.others} - set(SCHEMA[published]))
        for name, inner in read.items():
            element = SCHEMA[published].get(name, "").removeprefix("[]")
            if inner is not None and element in SCHEMA:
                yield from known(element, inner)

    # one type for two uses: of a volume and in a projection, which has no mode of its own; with and without "optional"
    shared = {"SecretProjection.secretName", "SecretVolumeSource.name", "LocalObjectReference.optional"}
    shared |= {f"{kind}Projection.defaultMode" for kind in ("Secret", "ConfigMap", "DownwardAPI")}
    assert set(known(pod_schema.ROOT, PodSpec)) == shared
    assert not set(known(CLAIM, ClaimSpec))


@pytest.mark.parametrize(("path", "type_", "says"), [field for field in claim_fields() if field[2] != READ])
def test_what_is_not_read_of_a_claim(path: str, type_: str, says: str) -> None:
    assert says == "refused", "a volume that is not what was asked for is none"
    *steps, last = path.removeprefix("spec.").split(".")
    spec: Spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    assert what_is_wrong(PersistentVolumeClaim(spec=spec), StorageClass()) == ""
    place = spec
    for step in steps:
        place = place[step]
    place[last] = sample(type_)
    assert what_is_wrong(PersistentVolumeClaim(spec=spec), StorageClass()).startswith(f"{path}: ")


@pytest.mark.parametrize(("path", "type_", "says"), [field for field in fields() if field[2] != READ])
def test_what_is_not_read(path: str, type_: str, says: str) -> None:
    """Refused or noted by its path, or of no consequence."""
    value = False if path.endswith("allowPrivilegeEscalation") else sample(type_)
    spec = placed(path, value)
    refused: set[str] = set()
    try:
        parse_pod(spec)
    except Refusal as refusal:
        refused = {remark.field for remark in refusal.remarks}
    here = path.replace("[]", "[0]") if not type_.startswith("[]") else path.removesuffix("[]").replace("[]", "[0]")
    assert (here in refused) == (says.startswith("refused") and says != f"refused, but {value}")
    assert (here in {remark.field for remark in notes_of(spec)}) == says.startswith("noted")


def sample(type_: str) -> Any:
    """A value that asks for something."""
    if type_.startswith("[]"):
        return [sample(type_[2:])]
    simple = {"string": "x", "integer": 7, "boolean": True, "map": {"x": "x"}}
    if type_ in simple:
        return simple[type_]
    return {name: sample(inner) for name, inner in SCHEMA[type_].items()}


def placed(path: str, value: Any) -> Spec:
    """A small pod with ``value`` at ``path``."""
    spec: Spec = {"containers": [{"name": "main", "image": "i"}]}
    place: Any = spec
    *steps, last = path.removeprefix("spec.").split(".")
    for step in steps:
        name = step.removesuffix("[]")
        place = place.setdefault(name, [{}] if step.endswith("[]") else {})
        place = place[0] if isinstance(place, list) else place
    place[last.removesuffix("[]")] = value
    return spec


def test_a_field_that_is_not_published_is_refused_at_every_depth() -> None:
    """As one of a later version would be."""
    places = {path.rpartition(".")[0] for path, _, says in fields() if says == READ}
    for place in sorted(places):
        path = f"{place}.later"
        with pytest.raises(Refusal) as refused:
            parse_pod(placed(path, "x"))
        assert path.replace("[]", "[0]") in {remark.field for remark in refused.value.remarks}


# ── What is read has an effect ──────────────────────────────────────────────────────────────────

NAMES = ("a", "ab")
OTHER = {
    "Always": "Never", "TCP": "UDP", "HTTP": "HTTPS", "Exists": "Equal", "NoExecute": "NoSchedule",
    "metadata.name": "metadata.uid", "limits.cpu": "limits.memory", "500m": "1500m", "10.0.0.1": "10.0.0.2", "/p": "/q",
    "node.kubernetes.io/unreachable": "other", "1m": "2m", "1Gi": "2Gi",
}  # fmt: skip
"""Values for which "…b" would be illegal."""
ELSEWHERE_READ = {
    "spec.activeDeadlineSeconds", "spec.terminationGracePeriodSeconds", "spec.imagePullSecrets[].name",
    "spec.readinessGates[].conditionType", "spec.serviceAccountName", "spec.runtimeClassName",
    "spec.containers[].imagePullPolicy",
}  # fmt: skip
"""Used in the life of the pod, not in the request for its instance: tests/kube/test_node.py."""
PROBED = re.compile(r"spec\.containers\[\]\.(readiness|startup)Probe\.|.*\.livenessProbe\.successThreshold")
"""By the node itself: tests/kube/test_probes.py. A liveness probe succeeds at once: the API server demands it."""


def everything() -> Spec:
    """A pod with a value in each field that is read."""
    config_map = {"name": "a", "items": [{"key": "k", "path": "p", "mode": 0o400}], "optional": False}
    secret = {"items": [{"key": "k", "path": "s", "mode": 0o400}], "optional": False}
    downward = {
        "items": [
            {"path": "f", "fieldRef": {"fieldPath": "metadata.name"}, "mode": 0o400},
            {"path": "r", "mode": 0o400,
             "resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m", "containerName": "main"}},
        ]
    }  # fmt: skip
    whole = {key: dict(found) for key, found in (("configMap", config_map), ("secret", secret))}
    volumes: list[Spec] = [
        {"name": "v0", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "v1", "configMap": {**config_map, "defaultMode": 0o600}},
        {"name": "v2", "secret": {**secret, "secretName": "a", "defaultMode": 0o600}},
        {"name": "v3", "downwardAPI": {**downward, "defaultMode": 0o600}},
        {"name": "v4", "projected": {"defaultMode": 0o600, "sources": [
            {"configMap": whole["configMap"]},
            {"secret": {**whole["secret"], "name": "a"}},
            {"downwardAPI": downward},
            {"serviceAccountToken": {"path": "t", "audience": "x", "expirationSeconds": 3600}},
        ]}},
        {"name": "v5", "persistentVolumeClaim": {"claimName": "a", "readOnly": False}},
    ]  # fmt: skip
    probe = {
        "exec": {"command": ["true"]}, "initialDelaySeconds": 3, "periodSeconds": 5, "timeoutSeconds": 2,
        "failureThreshold": 4, "successThreshold": 1,
    }  # fmt: skip
    ref = {"name": "a", "key": "k", "optional": False}
    security = {"runAsUser": 7, "runAsGroup": 8, "runAsNonRoot": True}
    container = {
        "name": "main", "image": "i", "imagePullPolicy": "Always", "command": ["c"], "args": ["d"], "workingDir": "/w",
        "env": [
            {"name": "PLAIN", "value": "x"},
            {"name": "C", "valueFrom": {"configMapKeyRef": ref}},
            {"name": "S", "valueFrom": {"secretKeyRef": dict(ref)}},
            {"name": "F", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "R", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m",
                                                             "containerName": "main"}}},
        ],
        "envFrom": [{"prefix": "C_", "configMapRef": {"name": "a", "optional": False}},
                    {"prefix": "S_", "secretRef": {"name": "a", "optional": False}}],
        "ports": [{"name": "http", "containerPort": 80, "hostPort": 8080, "hostIP": "10.0.0.1", "protocol": "TCP"}],
        "resources": {"limits": {"cpu": "500m"}, "requests": {"memory": "500m"}},
        "volumeMounts": [{"name": f"v{number}", "mountPath": f"/m{number}", "readOnly": False} for number in range(6)],
        "livenessProbe": probe, "readinessProbe": probe, "startupProbe": {**probe, "periodSeconds": 6},
        "securityContext": security,
    }  # fmt: skip
    return {
        "containers": [container], "volumes": volumes, "restartPolicy": "Always", "hostname": "h",
        "securityContext": {**security, "sysctls": [{"name": "net.a", "value": "1"}]},
        "tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
                         "tolerationSeconds": 3},
                        {"key": "", "operator": "Exists", "effect": "", "tolerationSeconds": 2}],
    }  # fmt: skip


def observed(spec: Spec) -> Any:
    """All that is asked of this host's server for the pod, and of the cluster; or why it is not."""
    spec = copy.deepcopy(spec)  # parts are shared
    pod = msgspec.convert({"metadata": {"name": "web", "namespace": "default", "uid": "u" * 8}, "spec": spec}, Pod)
    data = {"k": "1", "kb": "2"}
    coded = {"k": "MQ==", "kb": "Mg=="}
    sources = Sources(
        {name: ConfigMap(data={**data, "of": name}) for name in NAMES},
        {name: Secret(data={**coded, "of": {"a": "YQ==", "ab": "YWI="}[name]}) for name in NAMES},
    )
    try:
        parsed = parse_pod(pod.spec)
        asked = needed(parsed)
        sources = msgspec.structs.replace(sources, tokens=dict.fromkeys(asked.tokens, "token"))
        placement = Placement(claims={name: f"vol-{name}" for name in NAMES})
        return asked, translate(pod, parsed, facts_of(pod, parsed, "here", "192.0.2.7"), sources, placement)
    except (Refusal, Missing) as problem:
        return str(problem)


def variants(spec: Spec, path: str) -> Iterator[Spec]:
    """``spec`` with another value at ``path``, once for each place that it has there."""
    for number in range(len(places(spec, path))):
        changed = copy.deepcopy(spec)
        part, key = places(changed, path)[number]
        part[key] = other(part[key])
        yield changed


def places(spec: Spec, path: str) -> list[tuple[Any, Any]]:
    """Where ``spec`` has ``path``: containers of the value, and its key or index there."""

    def below(part: Any, steps: list[str]) -> Iterator[tuple[Any, Any]]:
        if isinstance(part, list):
            for number, each in enumerate(part):
                yield from below(each, steps) if steps else [(part, number)]
        elif len(steps) == 1 and not isinstance(part.get(steps[0]), list):
            yield from [(part, steps[0])] if steps[0] in part else []
        elif steps[0] in part:
            yield from below(part[steps[0]], steps[1:])

    return list(below(spec, path.removeprefix("spec.").replace("[]", "").split(".")))


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case dict():
            return {name: other(each) for name, each in value.items()}
        case _:
            return OTHER.get(value, f"{value}b")


@pytest.mark.parametrize("path", [path for path, _, says in fields() if says == READ])
def test_what_is_read_changes_what_is_made(path: str) -> None:
    if path in ELSEWHERE_READ or PROBED.match(path):
        return
    spec = WITHOUT_EXEC if ".livenessProbe.httpGet" in path else WITH_TCP if ".tcpSocket" in path else BASE
    assert not isinstance(observed(spec), str), observed(spec)
    if path.endswith(".optional"):
        changed = [(absent(spec, path, False), absent(spec, path, True))]
    else:
        changed = [(spec, variant) for variant in variants(spec, path)]
    assert changed, f"everything() has no {path}"
    assert any(observed(before) != observed(after) for before, after in changed)


def absent(spec: Spec, path: str, optional: bool) -> Spec:
    """``spec`` with an object that does not exist."""
    found = copy.deepcopy(spec)
    part, key = places(found, path)[0]
    part[key] = optional
    part["secretName" if "secretName" in part else "name"] = "absent"
    return found


def _with_action(**action: Any) -> Spec:
    spec = copy.deepcopy(everything())
    probe = {key: value for key, value in spec["containers"][0]["livenessProbe"].items() if key != "exec"}
    spec["containers"][0]["livenessProbe"] = {**probe, **action}
    return spec


BASE = everything()
WITHOUT_EXEC = _with_action(httpGet={"port": 80, "path": "/p", "scheme": "HTTP"})
WITH_TCP = _with_action(tcpSocket={"port": 80})


def test_what_is_read_later_is_named_in_the_code() -> None:
    """A field that is decoded and never looked at would be dropped as well."""
    folder = Path(podspec.__file__).parent
    code = "".join(file.read_text() for file in folder.rglob("*.py") if file.name != "podspec.py")
    for path, _, says in fields():
        if says == READ and (path in ELSEWHERE_READ or PROBED.match(path)):
            name = re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", path.rpartition(".")[2].removesuffix("[]"))
            assert re.search(rf"\.{name}\b", code), path


if __name__ == "__main__":
    GOLDEN.write_text(render())
