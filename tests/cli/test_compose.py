"""Stacks: both formats, what is refused, and up and down against a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from hypeman.cli.compose import native, spec
from hypeman.cli.compose.model import ComposeError, Stack
from hypeman.cli.compose.plan import Act, Found, plan_down, plan_up
from hypeman.instances.model.types import CreateInstanceRequest, InstanceState

NATIVE = """
version: 1
name: shop
volumes:
  data: {size_gb: 2}
services:
  web:
    image: nginx
    env: {MODE: "${env:MODE}", DEBUG: true}
    cmd: [nginx, -g, daemon off;]
    volumes: ["data:/data:ro"]
    resources: {vcpus: 1, memory: 256MB, bandwidth_upload: 10mbps}
    restart: {policy: always, backoff: 5s}
    healthcheck: {type: tcp, tcp: {port: 80}}
    ingress: [{hostname: shop.example.com, target_port: 80}]
  db:
    image: postgres
    volumes: [{volume: data, mount_path: /var/lib/postgresql/data}]
"""

COMPOSE = """
name: trial
x-env: &env {A: "1", B: "${B:-two}"}
services:
  web:
    image: nginx:${TAG:?which one}
    environment: {<<: *env, PRICE: "$$5"}
    ports: ["8080:80", {target: 443, published: 8443, protocol: tcp, host_ip: 127.0.0.1}]
    depends_on: {db: {condition: service_healthy}, init: {condition: service_completed_successfully}}
    restart: on-failure:3
    deploy: {resources: {limits: {cpus: "1.5", memory: 512m}}}
    user: "1000:1000"
  init: {image: busybox, command: "sh -c 'echo ready'"}
  db:
    image: postgres
    volumes: ["data:/var/lib/postgresql/data", {type: volume, source: data, target: /copy, read_only: true}]
    healthcheck: {test: [CMD, pg_isready], interval: 2s, retries: 5}
  extra: {image: busybox, profiles: [debug]}
volumes: {data: {x-size: 3GB}}
"""


def load(text: str, directory: Path, **environ: str) -> Stack:
    tree = yaml.safe_load(text)
    if tree.get("version") == 1:
        return native.parse(tree, directory, environ)
    return spec.parse(tree, directory, environ)


def test_our_own_format(tmp_path: Path) -> None:
    stack = load(NATIVE, tmp_path, MODE="fast")
    web, db = stack.services
    request = msgspec.convert({**web.body, "volumes": web.mounts}, CreateInstanceRequest)
    assert (request.name, request.env, request.vcpus, request.size) == (
        "shop-web", {"MODE": "fast", "DEBUG": "true"}, 1, "256MB",
    )  # fmt: skip
    assert request.restart_policy is not None and request.restart_policy.backoff == "5s"
    assert request.volumes[0].volume_id == "shop-data" and request.volumes[0].readonly
    [ingress] = web.ingresses
    assert ingress.body["rules"] == [
        {"match": {"hostname": "shop.example.com"}, "target": {"instance": "shop-web", "port": 80}}
    ]
    assert db.mounts == ({"volume_id": "shop-data", "mount_path": "/var/lib/postgresql/data"},)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1, "name": "a", "services": {}, "unknown": 1}, "unknown"),
        ({"version": 1, "name": "a", "services": {"w": {"dockerfile": "."}}}, "does not build"),
        ({"version": 1, "name": "a", "services": {"w": {}}}, "image is missing"),
        ({"version": 1, "name": "a", "services": {"w": {"image": "x", "volumes": ["d:/d"]}}}, "no volume 'd'"),
        ({"version": 1, "name": "a", "services": {"w": {"image": "${env:GONE}"}}}, "GONE"),
        ({"version": 1, "name": "a", "services": {"w": {"image": "${file:gone}"}}}, "cannot be read"),
        ({"services": {"w": {"image": "x", "privileged": True}}}, "kernel of its own"),
        ({"services": {"w": {"image": "x", "volumes": ["./here:/there:ro"]}}}, "here does not exist"),
        ({"services": {"w": {"image": "x", "unheard_of": 1}}}, "unheard_of"),
        ({"services": {"w": {"image": "x", "deploy": {"replicas": 3}}}}, "replicas"),
        ({"services": {"w": {"image": "x", "depends_on": ["gone"]}}}, "no service 'gone'"),
        ({"services": {"a": {"image": "x", "depends_on": ["b"]}, "b": {"image": "x", "depends_on": ["a"]}}}, "cycle"),
        ({"services": {"w": {"image": "${TAG:?which}"}}}, "which"),
        ({"services": []}, "no services"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ComposeError) as refused:
        load(yaml.safe_dump(change), tmp_path).ordered()
    assert message in str(refused.value)


def test_values_from_files_and_nested(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("${env:REGISTRY}/app:v1\n")
    (tmp_path / "loop").write_text("${file:loop}")
    tree: dict[str, Any] = {"version": 1, "name": "a", "services": {"w": {"image": "${file:image}"}}}
    assert native.parse(tree, tmp_path, {"REGISTRY": "quay.io"}).services[0].body["image"] == "quay.io/app:v1"
    tree["services"]["w"]["image"] = "${file:loop}"
    with pytest.raises(ComposeError, match="16 levels"):
        native.parse(tree, tmp_path, {})


def test_files_of_the_compose_specification(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TAG='1.25'\n# none\n")
    stack = load(COMPOSE, tmp_path)
    by_key = {service.key: service for service in stack.services}
    assert set(by_key) == {"web", "init", "db"}
    assert {
        service.key for service in spec.parse(yaml.safe_load(COMPOSE), tmp_path, {}, frozenset(["debug"])).services
    } > {"extra"}
    assert [service.key for service in stack.ordered()] == ["db", "init", "web"]
    request = msgspec.convert(by_key["web"].body, CreateInstanceRequest)
    assert request.image == "nginx:1.25"
    assert request.env == {"A": "1", "B": "two", "PRICE": "$5"}
    assert [(port.host_port, port.guest_port, port.host_address) for port in request.ports] == [
        (8080, 80, ""), (8443, 443, "127.0.0.1"),
    ]  # fmt: skip
    assert (request.size, request.vcpus, request.user, request.hostname) == ("512MB", 2, "1000:1000", "web")
    assert request.restart_policy is not None and request.restart_policy.max_attempts == 3
    assert by_key["init"].body["cmd"] == ["sh", "-c", "echo ready"]
    health = msgspec.convert(by_key["db"].body, CreateInstanceRequest).health_check
    assert health is not None and health.exec is not None
    assert (health.exec.command, health.failure_threshold) == (("pg_isready",), 5)
    assert stack.volumes[0].size_gb == 3
    assert by_key["db"].mounts[1] == {"volume_id": "trial-data", "mount_path": "/copy", "readonly": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${A:-x}", "x"), ("${A-x}", ""), ("${A-http://x}", ""), ("${B-http://x}", "http://x"), ("${C:-x}", "c"),
        ("${A:+x}", ""), ("${A+x:y}", "x:y"), ("${B+x}", ""), ("$C-$$C", "c-$C"), ("${B}", ""),
    ],
)  # fmt: skip
def test_variables_of_the_compose_specification(text: str, value: str) -> None:
    """A colon in the default is not the colon by which an empty value counts as none."""
    assert spec.interpolated(text, {"A": "", "C": "c"}) == value


@pytest.mark.parametrize("restart", ["always:3", "on-failure:x", "sometimes"])
def test_restarts_that_mean_nothing(tmp_path: Path, restart: str) -> None:
    with pytest.raises(ComposeError, match="restart"):
        load(yaml.safe_dump({"services": {"w": {"image": "x", "restart": restart}}}), tmp_path)


def test_plans() -> None:
    stack = load(NATIVE, Path(), MODE="x")
    first = plan_up(stack, Found())
    assert [(action.act, action.kind) for action in first] == [
        (Act.CREATE, "volume"), (Act.CREATE, "instance"), (Act.CREATE, "instance"), (Act.CREATE, "ingress"),
    ]  # fmt: skip
    changed = {"name": "shop-web", "state": "Running", "tags": {"hypeman.compose.hash": "other"}}
    with pytest.raises(ComposeError, match="--replace"):
        plan_up(stack, Found([changed]))
    acts = {action.name: action.act for action in plan_up(stack, Found([changed]), replace=True)}
    assert acts["shop-web"] is Act.REPLACE
    orphan = {"name": "shop-old", "state": "Running", "tags": {}}
    assert {a.name: a.act for a in plan_up(stack, Found([orphan]))}["shop-old"] is Act.KEEP
    assert {a.name: a.act for a in plan_up(stack, Found([orphan]), remove_orphans=True)}["shop-old"] is Act.DELETE
    with pytest.raises(ComposeError, match="size of a volume"):
        plan_up(stack, Found((), [{"name": "shop-data", "size_gb": 9}]))
    down = plan_down(Found([changed], [{"name": "shop-data"}], [{"name": "rule"}]))
    assert [action.kind for action in down] == ["ingress", "instance"]


def test_up_and_down(cli: Any, server: Any, tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(
        "name: s\nservices:\n  a: {image: nginx}\n  b: {image: nginx, volumes: ['d:/d']}\nvolumes: {d: {}}\n"
    )
    done = cli("compose", "-f", str(file), "up")
    assert done.exit_code == 0, done.output
    assert {row.name for row in server.world.instances.instances.values()} == {"s-a", "s-b"}
    again = cli("compose", "-f", str(file), "up")
    assert (again.exit_code, again.stderr) == (0, ""), "nothing to do the second time"
    rows = json.loads(cli("-o", "json", "compose", "-p", "s", "ps").stdout)
    assert [row["tags"]["hypeman.compose.service"] for row in rows] == ["a", "b"]
    server.world.instances.instances[rows[0]["id"]] = msgspec.structs.replace(
        server.world.instances.instances[rows[0]["id"]], state=InstanceState.STOPPED
    )
    assert "start    instance  s-a" in cli("compose", "-f", str(file), "plan").stdout
    file.write_text(file.read_text().replace("a: {image: nginx}", "a: {image: nginx, user: '7'}"))
    refused = cli("compose", "-f", str(file), "up")
    assert (refused.exit_code, "--replace" in refused.stderr) == (1, True)
    assert cli("compose", "-f", str(file), "up", "--replace").exit_code == 0
    assert cli("compose", "-p", "s", "down").exit_code == 0
    assert not server.world.instances.instances and server.world.volumes.volumes
    assert cli("compose", "-p", "s", "down", "--volumes").exit_code == 0
    assert not server.world.volumes.volumes


def test_a_file_that_cannot_be_read(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no hypeman.compose.yaml" in cli("compose", "config").stderr
    (tmp_path / "compose.yaml").write_text("services: [")
    assert (cli("compose", "config").exit_code, "cannot be read" in cli("compose", "config").stderr) == (1, True)


def test_logs_keep_bytes_that_are_not_text(cli: Any, server: Any) -> None:
    tags = ("-l", "hypeman.compose.name=s", "-l", "hypeman.compose.service=web")
    assert cli("run", "nginx", "--name", "web", *tags).exit_code == 0
    (server.world.log_directory / "web-app.log").write_bytes(b"\xff\xfe\nplain\n")
    assert cli("compose", "-p", "s", "logs").stdout_bytes == b"web | \xff\xfe\nweb | plain\n"
