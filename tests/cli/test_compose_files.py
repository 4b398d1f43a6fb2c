"""Compose files of the kinds that people publish: what becomes of them, and what is refused with which reason."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from hypeman.cli.compose import spec
from hypeman.cli.compose.model import ComposeError, Service, Stack
from hypeman.egress.types import CredentialPolicy
from hypeman.instances.model.types import CreateInstanceRequest, InstanceState

WORDPRESS = """
services:
  db:
    image: mariadb:10.6.4-focal
    command: --default-authentication-plugin=mysql_native_password
    volumes: [db_data:/var/lib/mysql]
    restart: always
    environment: [MYSQL_ROOT_PASSWORD=somewordpress, MYSQL_DATABASE=wordpress]
    expose: [3306, 33060]
  wordpress:
    image: wordpress:latest
    volumes: [wp_data:/var/www/html]
    ports: ["80:80"]
    restart: always
    environment: {WORDPRESS_DB_HOST: db, WORDPRESS_DB_PASSWORD: wordpress}
volumes: {db_data: , wp_data: }
"""
FLASK = """
services:
  web:
    build: {context: app, target: builder, args: {PY: "3.12"}}
    stop_signal: SIGINT
    stop_grace_period: 30s
    ports: ['8000:8000']
    depends_on:
      redis: {condition: service_healthy, restart: true}
    develop: {watch: [{action: rebuild, path: ./app}]}
  redis:
    image: redis:alpine
    healthcheck: {test: [CMD, redis-cli, ping], interval: 5s, start_interval: 1s}
"""
POSTGRES = """
services:
  postgres:
    image: postgres:latest
    shm_size: 128mb
    ulimits: {nofile: {soft: 20000, hard: 40000}, nproc: 65535}
    sysctls: [net.core.somaxconn=1024]
    environment: [POSTGRES_USER=yourUser, "POSTGRES_PASSWORD=${PASSWORD:?set it}"]
    volumes: [postgres:/data/postgres]
    deploy:
      replicas: 1
      restart_policy: {condition: on-failure, max_attempts: 3, window: 120s}
      resources: {limits: {cpus: '0.50', memory: 512M}, reservations: {cpus: '0.25'}}
  pgadmin:
    image: dpage/pgadmin4:latest
    ports: [{target: 80, published: "5050", protocol: tcp, mode: host}]
    profiles: [admin]
volumes: {postgres: {driver: local}}
"""
ANCHORS = """
x-common: &common
  image: ghcr.io/acme/app:1
  environment: &env {LEVEL: info}
  restart: unless-stopped
services:
  api: {<<: *common, command: [serve]}
  worker:
    <<: *common
    command: work --queue default
    environment: {<<: *env, QUEUE: default}
"""


def load(text: str, directory: Path, *profiles: str, **environ: str) -> Stack:
    stack = spec.parse(yaml.safe_load(text), directory, environ, frozenset(profiles))
    stack.ordered()
    for service in stack.services:
        msgspec.convert({**service.body, "volumes": service.mounts}, CreateInstanceRequest)
    return stack


def by_key(stack: Stack) -> dict[str, Service]:
    return {service.key: service for service in stack.services}


def test_a_site_with_its_database(tmp_path: Path) -> None:
    stack = load(WORDPRESS, tmp_path)
    db, site = by_key(stack)["db"], by_key(stack)["wordpress"]
    assert db.body["cmd"] == ["--default-authentication-plugin=mysql_native_password"]
    assert site.body["env"]["WORDPRESS_DB_HOST"] == "db"
    assert [volume.key for volume in stack.volumes] == ["db_data", "wp_data"]
    assert stack.warnings == ()


def test_a_service_that_is_built(tmp_path: Path) -> None:
    stack = load(FLASK, tmp_path)
    web = by_key(stack)["web"]
    assert web.build == {"context": str(tmp_path / "app"), "target": "builder", "build_args": {"PY": "3.12"}}
    assert web.body["image"] == f"localhost/{web.name}:latest"
    assert web.depends_on == {"redis": "healthy"}
    assert [warning.split(" is ignored")[0] for warning in stack.warnings] == ["services.web.stop_grace_period"]
    assert web.watch[0].path == tmp_path / "app"


def test_limits_settings_and_profiles(tmp_path: Path) -> None:
    stack = load(POSTGRES, tmp_path, PASSWORD="x")
    [postgres] = stack.services
    assert postgres.tags == {
        "hypeman.shm-size": "128MB", "hypeman.ulimit.nofile": "20000:40000", "hypeman.ulimit.nproc": "65535",
        "hypeman.sysctl.net.core.somaxconn": "1024",
    }  # fmt: skip
    assert postgres.body["restart_policy"]["max_attempts"] == 3
    assert (postgres.body["vcpus"], postgres.body["size"]) == (1, "512MB")
    assert set(by_key(load(POSTGRES, tmp_path, "admin", PASSWORD="x"))) == {"postgres", "pgadmin"}
    assert set(by_key(load(POSTGRES, tmp_path, PASSWORD="x", COMPOSE_PROFILES="admin"))) == {"postgres", "pgadmin"}
    with pytest.raises(ComposeError, match="set it"):
        load(POSTGRES, tmp_path)


def test_anchors(tmp_path: Path) -> None:
    services = by_key(load(ANCHORS, tmp_path))
    assert services["worker"].body["env"] == {"LEVEL": "info", "QUEUE": "default"}
    assert services["worker"].body["cmd"] == ["work", "--queue", "default"]
    assert services["api"].body["image"] == "ghcr.io/acme/app:1"


def test_extends_and_include(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "web.env").write_text("FROM_FILE=yes\n")
    (tmp_path / "base" / "common.yaml").write_text(
        """
services:
  web:
    extends: plain
    env_file: web.env
    environment: [A=base, B=base]
    ports: ["80:80"]
    build: ./src
  plain: {image: nginx, command: [base], labels: [x=1]}
"""
    )
    store = "services: {db: {image: postgres, volumes: ['d:/d']}}\nvolumes: {d: }"
    (tmp_path / "base" / "store.yaml").write_text(store)
    stack = load(
        """
include: [base/store.yaml]
services:
  web:
    extends: {file: base/common.yaml, service: web}
    environment: {B: own}
    ports: ["8443:443"]
    command: [own]
    depends_on: [db]
""",
        tmp_path,
    )
    web, db = by_key(stack)["web"], by_key(stack)["db"]
    assert web.body["env"] == {"FROM_FILE": "yes", "A": "base", "B": "own"}
    assert (web.body["image"], web.body["cmd"]) == ("nginx", ["own"])
    assert [port["guest_port"] for port in web.body["ports"]] == [80, 443]
    assert web.build == {"context": str(tmp_path / "base" / "src")}
    assert (db.mounts[0]["volume_id"], web.depends_on) == (stack.volumes[0].name, {"db": "started"})


def test_files_of_one_folder_may_extend_services_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("services: {web: {extends: {file: last.yaml, service: web}, user: a}}")
    (tmp_path / "last.yaml").write_text("services: {web: {image: nginx}}")
    stack = load("services: {web: {extends: {file: middle.yaml, service: web}}}", tmp_path)
    assert (by_key(stack)["web"].body["image"], by_key(stack)["web"].body["user"]) == ("nginx", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("services: {a: {extends: {file: self.yaml, service: a}}}", "extends itself"),
        ("services: {a: {extends: b}, b: {extends: a}}", "extends itself"),
        ("services: {a: {extends: gone}}", "no service 'gone'"),
        ("services: {a: {extends: {file: gone.yaml, service: a}}}", "cannot be read"),
        ("include: [gone.yaml]\nservices: {a: {image: x}}", "cannot be read"),
        ("include: [loop.yaml]\nservices: {a: {image: x}}", "16 levels"),
        ("include: [other.yaml]\nservices: {a: {image: x}}", "services.a of the file is there already"),
        ("include: [{path: other.yaml, env_file: x}]", "path and project_directory"),
        ("services: {a: {image: x, network_mode: host}}", "has its own network"),
        ("services: {a: {image: x, networks: {n: {aliases: [b]}}}}\nnetworks: {n: }", "names are its own"),
        ("services: {a: {image: x, networks: [n]}}", "no network n"),
        ("services: {a: {image: x}}\nnetworks: {n: {internal: true}}", "egress rules"),
        ("services: {a: {image: x, secrets: [s]}}", "no secret 's'"),
        ("services: {a: {image: x, secrets: [s]}}\nsecrets: {s: {environment: S}}", "does not hold secrets"),
        ("services: {a: {image: x, extra_hosts: [a=1.2.3.4]}}", "look names up at the host"),
        ("services: {a: {image: x, deploy: {resources: {reservations: {devices: [{driver: nvidia}]}}}}}", "device"),
        ("services: {a: {image: x, build: {context: ., ssh: [default]}}}", "more options"),
        ("include: [{path: 5}]\nservices: {a: {image: x}}", "the file does not follow"),
        ("services: {a: {image: x}}\nvolumes: {v: 5}", "volumes does not follow"),
        ("services: {a: {image: x}}\nnetworks: {n: 5}", "networks does not follow"),
        ("services: {a: {image: x, profiles: 5}}", "services.a.profiles does not follow"),
        ("services: {a: {image: x, ports: 80}}", "services.a does not follow"),
        ("services: {a: {image: x, cpus: few}}", "services.a does not follow"),
        ("services: {a: {image: x, shm_size: few}}", "services.a: 'few' is not a size"),
        ("services: {a: {image: x, pid: host}}", "kernel of its own"),
        ("services: {1: {image: x}}", "services.1: a key must be a text"),
        ("services: {a: {image: [x]}}", "image must be a text"),
        ("services: {a: {image: x, environment: A=b}}", "must be a mapping"),
        ("services: {a: {image: x, environment: {A: [b]}}}", "A must be a text"),
        ("services: {a: {image: x, develop: []}}", "develop must have keys"),
        ("services: {a: {image: x, deploy: {resources: {limit: {}}}}}", "resources.limit is not supported"),
        ("services: {a: {image: x, volumes: [{type: bind, target: /x}]}}", "the source is missing"),
        ("services: {a: {image: x, network_mode: none, networks: [n]}}\nnetworks: {n: }", "exclude each other"),
        ("services: {a: {build: 'https://example.com/a.git'}}", "clone the repository"),
        ("services: {a: {image: x}}\nconfigs: {c: {file: x}}", "into the image"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loop.yaml").write_text("include: [loop.yaml]")
    (tmp_path / "self.yaml").write_text("services: {a: {extends: {file: self.yaml, service: a}}}")
    (tmp_path / "other.yaml").write_text("services: {a: {image: y}}")
    with pytest.raises(ComposeError) as refused:
        load(text, tmp_path)
    assert message in str(refused.value)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100000 values"),
        ("services: &a {web: *a}", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_file_that_grows_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "compose.yaml").write_text(text)
    with pytest.raises(ComposeError, match=message):
        spec.read_yaml(tmp_path / "compose.yaml")


def test_keys_of_the_file_itself_and_dependencies_that_may_be_absent(tmp_path: Path) -> None:
    text = """
services:
  web:
    build: {context: ., x-bake: {platforms: [linux/arm64]}}
    deploy: {x-owner: me}
    depends_on: {debug: {condition: service_started, required: false}, db: {condition: service_started}}
  db: {image: postgres}
  debug: {image: busybox, profiles: [debug]}
"""
    assert by_key(load(text, tmp_path))["web"].depends_on == {"db": "started"}
    assert by_key(load(text, tmp_path, "debug"))["web"].depends_on == {"debug": "started", "db": "started"}


APART = """
services:
  proxy: {image: nginx, networks: [frontend]}
  app: {image: app, networks: [frontend, backend]}
  db: {image: postgres, networks: [backend]}
networks: {frontend: {driver: bridge}, backend: }
"""


def test_services_that_are_kept_apart(tmp_path: Path) -> None:
    assert groups(load(APART, tmp_path)) == {"proxy": ["frontend"], "app": ["backend", "frontend"], "db": ["backend"]}
    more = APART.replace("services:", "services:\n  job: {image: x, network_mode: none}\n  web: {image: x}")
    assert groups(load(more, tmp_path)) == {
        "job": None, "web": ["default"], "proxy": ["frontend"], "app": ["backend", "frontend"], "db": ["backend"],
    }  # fmt: skip
    for together in (APART + "x-networks: shared\n", APART.replace("[frontend]", "[frontend, backend]")):
        assert set(groups(load(together, tmp_path)).values()) == {None}


def groups(stack: Stack) -> dict[str, list[str] | None]:
    """What the services ask for, as the server reads it."""
    for service in stack.services:
        msgspec.convert(service.body, CreateInstanceRequest)
    return {service.key: service.body.get("network", {}).get("groups") for service in stack.services}


SECRET = """
services:
  agent: {image: agent, secrets: [{source: openai, target: api-key}], environment: {MODE: fast}}
secrets:
  openai:
    environment: OPENAI
    x-inject: [{hosts: [api.openai.com], as: {header: Authorization, format: "Bearer $${value}"}}]
"""


def test_a_secret_becomes_a_credential(tmp_path: Path) -> None:
    [agent] = load(SECRET, tmp_path, OPENAI="sk-1").services
    found = msgspec.convert(agent.body["credentials"]["API_KEY"], CredentialPolicy)
    assert (found.source.env, found.inject[0].hosts) == ("API_KEY_VALUE", ("api.openai.com",))
    assert found.inject[0].as_.format == "Bearer ${value}"
    assert agent.body["network"] == {"egress": {"enabled": True}}
    assert agent.secrets == {"API_KEY_VALUE": "sk-1"}
    assert "sk-1" not in str(agent.content)
    with pytest.raises(ComposeError, match="no variable OPENAI"):
        load(SECRET, tmp_path)


def test_a_secrets_value_is_sent_and_not_shown(
    cli: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI", "sk-1")
    file = tmp_path / "compose.yaml"
    file.write_text("name: s\n" + SECRET)
    assert "sk-1" not in cli("compose", "-f", str(file), "config").output
    assert cli("compose", "-f", str(file), "up").exit_code == 0
    [request] = [request for what, request in server.world.instances.asked if what == "create"]
    assert request.env == {"MODE": "fast", "API_KEY_VALUE": "sk-1"}


def test_config_shows_what_is_watched(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    file = tmp_path / "compose.yaml"
    rule = "{action: sync, path: ./src, target: /src}"
    file.write_text(f"services: {{web: {{image: nginx, develop: {{watch: [{rule}]}}}}}}")
    shown = cli("-o", "json", "compose", "-f", str(file), "config")
    assert json.loads(shown.stdout)["services"][0]["watch"][0]["path"] == str(tmp_path / "src")


def test_standby_start_and_fork(cli: Any, server: Any, tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text("services: {web: {image: nginx}, my_db: {image: postgres}}")
    assert cli("compose", "-f", str(file), "-p", "shop", "up").exit_code == 0
    assert cli("compose", "-p", "shop", "standby").exit_code == 0
    assert states(server) == {"shop-web": "Standby", "shop-my-db": "Standby"}
    assert cli("compose", "-p", "shop", "start").exit_code == 0
    assert cli("compose", "-p", "shop", "fork", "-p", "trial2").exit_code == 0
    assert states(server) == dict.fromkeys(["shop-web", "shop-my-db", "trial2-web", "trial2-my-db"], "Running")
    rows = json.loads(cli("-o", "json", "compose", "-p", "trial2", "ps").stdout)
    assert {row["name"]: row["tags"]["hypeman.compose.service"] for row in rows} == {
        "trial2-web": "web", "trial2-my-db": "my_db",
    }  # fmt: skip
    again = cli("compose", "-p", "shop", "fork", "-p", "trial2")
    assert (again.exit_code, "a stack trial2 already" in again.stderr) == (1, True)
    assert "no stack gone" in cli("compose", "-p", "gone", "fork", "-p", "x").stderr
    assert cli("compose", "-p", "trial2", "down").exit_code == 0
    assert set(states(server)) == {"shop-web", "shop-my-db"}


def states(server: Any) -> dict[str, InstanceState]:
    return {each.name: each.state for each in server.world.instances.instances.values()}


def test_an_image_is_built_if_it_is_missing(cli: Any, server: Any, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "Dockerfile").write_text("FROM scratch\n")
    file = tmp_path / "compose.yaml"
    file.write_text("name: s\nservices: {web: {build: app, image: team/web:v1}}")
    server.world.builds.outcome = {"image_ref": "docker.io/team/web:v1", "image_digest": "sha256:abc"}
    done = cli("compose", "-f", str(file), "up")
    assert done.exit_code == 0, done.output
    assert "build    image     team/web:v1" in done.stderr
    assert server.world.builds.fields["image_name"] == b"team/web:v1"
