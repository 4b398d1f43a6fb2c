"""Compose files of the kinds that people publish: what becomes of them, and what is refused with which reason."""

from __future__ import annotations

import base64
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
    assert [warning.split(" is ignored")[0] for warning in stack.warnings] == [
        "services.web.stop_signal", "services.web.stop_grace_period", "services.web.depends_on.restart",
        "services.redis.healthcheck.start_interval",
    ]  # fmt: skip
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
        ("services: {a: {image: x, build: {context: ., ssh: [default]}}}", "hypeman build --ssh"),
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
        ("services: {a: {image: x, configs: [c]}}", "no config 'c'"),
        ("services: {a: {image: x, configs: [c]}}\nconfigs: {c: {}}", "one of content, environment and file"),
        ("services: {a: {image: x, configs: [c]}}\nconfigs: {c: {environment: GONE}}", "no variable GONE"),
        ("services: {a: {image: x, configs: [c]}}\nconfigs: {c: {file: gone}}", "gone cannot be read"),
        ("services: {a: {image: x, configs: [c]}}\nconfigs: {c: {external: true}}", "says what is in it"),
        ("services: {a: {image: x, configs: [{source: c, target: etc}]}}\nconfigs: {c: {content: x}}", "absolute path"),
        ("services: {a: {image: x, configs: [c, c]}}\nconfigs: {c: {content: x}}", "two files for /c"),
        ("services: {a: {build: {dockerfile: D, dockerfile_inline: FROM x}}}", "exclude each other"),
        ("services: {a: {build: {network: host}}}", "default or none"),
        ("services: {a: {image: x, links: ['b:c']}, b: {image: x}}", "no other name"),
        ("services: {a: {image: x, scale: 2}}", "services.a.scale must be 1"),
        ("services: {a: {image: x, networks: {n: {alias: [b]}}}}\nnetworks: {n: }", "no such key"),
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


CONFIGS = """
name: s
services:
  web:
    image: nginx
    configs: [plain, {source: from_file, target: /etc/app/conf, uid: "33", gid: "34", mode: 0440}, {source: port}]
    volumes: [./nginx.conf:/etc/nginx/nginx.conf:ro, ./state.db:/var/lib/state.db, ./new:/data]
configs:
  plain: {content: "listen ${PORT}"}
  from_file: {file: ./conf}
  port: {environment: PORT}
"""


def test_files_are_mounted_one_by_one(tmp_path: Path) -> None:
    for name in ("conf", "nginx.conf", "state.db"):
        (tmp_path / name).write_text(f"{name} here")
    stack = load(CONFIGS, tmp_path, PORT="8080")
    [web] = stack.services
    state, new, files = stack.volumes
    found = {file.path: (file.mode, file.uid, file.gid, file.source or file.content) for file in files.files}
    about = (tmp_path / "nginx.conf").stat()
    assert found == {
        "plain": (0o444, 0, 0, "listen 8080"),
        "etc/app/conf": (0o440, 33, 34, str(tmp_path / "conf")),
        "port": (0o444, 0, 0, "8080"),
        "etc/nginx/nginx.conf": (about.st_mode & 0o777, about.st_uid, about.st_gid, str(tmp_path / "nginx.conf")),
    }
    assert web.mounts == (
        {"volume_id": "s-web-var-lib-state-db-ea74d9", "mount_path": "/", "files": True},
        {"volume_id": "s-web-data", "mount_path": "/data"},
        {"volume_id": files.name, "mount_path": "/", "readonly": True, "files": True},
    )
    assert (state.name, new.copied) == ("s-web-var-lib-state-db-ea74d9", "")
    assert any("new does not exist: the guest gets an empty volume" in warning for warning in stack.warnings)
    (tmp_path / "conf").write_text("changed")
    changed = load(CONFIGS, tmp_path, PORT="8080")
    assert changed.services[0].content != web.content
    assert changed.volumes[:2] == stack.volumes[:2]


def test_labels_are_tags_and_those_that_cannot_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a=file\nb=file\n")
    rule = "traefik.http.routers.x.rule=Host(`x`)"
    text = f"services: {{web: {{image: nginx, label_file: labels, labels: [a=own, hypeman.pid1=true, '{rule}']}}}}"
    stack = load(text, tmp_path)
    assert stack.services[0].tags == {"a": "own", "b": "file", "hypeman.pid1": "true"}
    [warning] = stack.warnings
    assert "labels is ignored in part: value of tag 'traefik" in warning


BUILD = """
services:
  web:
    platform: linux/amd64
    build:
      context: app
      dockerfile_inline: |
        FROM scratch
        COPY . /
      labels: {team: a, released: true}
      tags: [team/web:v1, team/web:latest]
      platforms: [linux/amd64, linux/arm64]
      no_cache: true
      pull: true
      cache_from: [team/web:cache]
      network: none
      sbom: true
      secrets: [{source: npm, target: token}]
secrets: {npm: {environment: NPM}}
"""


def test_what_a_build_has(cli: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "compose.yaml").write_text(BUILD)
    monkeypatch.setenv("NPM", "the token")
    server.world.builds.outcome = {"image_ref": "localhost/x", "image_digest": "sha256:abc"}
    shown = cli("compose", "-f", str(tmp_path / "compose.yaml"), "config").output
    assert base64.b64encode(b"the token").decode() not in shown
    assert cli("compose", "-f", str(tmp_path / "compose.yaml"), "up", "--build").exit_code == 0
    fields = {name: value.decode() for name, value in server.world.builds.fields.items() if name != "source"}
    assert fields["dockerfile"] == "FROM scratch\nCOPY . /\n"
    assert json.loads(fields["labels"]) == {"team": "a", "released": "true"}
    assert json.loads(fields["image_names"]) == ["team/web:v1", "team/web:latest"]
    assert fields["platform"] == "linux/amd64,linux/arm64"
    assert (fields["no_cache"], fields["pull"], fields["network"], fields["sbom"]) == (
        "true",
        "true",
        "isolated",
        "true",
    )
    assert json.loads(fields["cache_from"]) == ["type=registry,ref=team/web:cache"]
    assert json.loads(fields["secrets"]) == [{"id": "token", "value_base64": base64.b64encode(b"the token").decode()}]


OVERRIDE = """
services:
  web:
    command: !reset null
    ports: !override ["9090:80"]
    environment: {A: !reset null, B: over}
    volumes: [other:/data]
  gone: !reset null
volumes: {other: }
"""
BASE = """
name: s
services:
  web: {image: nginx, command: run, ports: ["80:80"], environment: {A: base, C: base}, volumes: ["data:/data"]}
  gone: {image: nginx}
volumes: {data: }
"""


def test_files_over_each_other(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compose.yaml").write_text(BASE)
    (tmp_path / "compose.override.yml").write_text(OVERRIDE)
    (tmp_path / "third.yaml").write_text("services: {web: {ports: ['9091:81']}}")
    monkeypatch.chdir(tmp_path)
    by_itself = json.loads(cli("-o", "json", "compose", "config").stdout)
    [web] = by_itself["services"]
    assert "cmd" not in web["body"]
    assert web["body"]["env"] == {"B": "over", "C": "base"}
    assert [port["host_port"] for port in web["body"]["ports"]] == [9090]
    assert [(mount["volume_id"], mount["mount_path"]) for mount in web["mounts"]] == [("s-other", "/data")]
    files = ("-f", "compose.yaml", "-f", "compose.override.yml", "-f", "third.yaml")
    [web] = json.loads(cli("-o", "json", "compose", *files, "config").stdout)["services"]
    assert [port["host_port"] for port in web["body"]["ports"]] == [9090, 9091]
    alone = json.loads(cli("-o", "json", "compose", "-f", "compose.yaml", "config").stdout)
    assert [service["key"] for service in alone["services"]] == ["web", "gone"]
    (tmp_path / "third.yaml").write_text("services: {web: {ports: !reser []}}")
    assert "there is no tag !reser" in cli("compose", *files, "config").stderr


def test_tags_apply_to_what_a_service_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("services: {base: {image: x, command: run, ports: ['80:80'], user: root}}")
    (tmp_path / "compose.yaml").write_text(
        "services: {web: {extends: {file: base.yaml, service: base}, command: !reset null, ports: !override ['81:81']}}"
    )
    stack = spec.parse(spec.read_yaml(tmp_path / "compose.yaml"), tmp_path, {})
    body = stack.services[0].body
    assert ("cmd" in body, [port["host_port"] for port in body["ports"]], body["user"]) == (False, [81], "root")


def test_volumes_of_somebody_else(cli: Any, server: Any, tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(
        "name: s\nservices: {web: {image: nginx, volumes: [d:/d]}}\nvolumes: {d: {external: true, name: theirs}}"
    )
    refused = cli("compose", "-f", str(file), "up")
    assert (refused.exit_code, "there is no volume 'theirs'" in refused.stderr) == (1, True)
    assert cli("volume", "create", "--name", "theirs", "--size", "1GB").exit_code == 0
    assert cli("compose", "-f", str(file), "up").exit_code == 0
    assert cli("compose", "-f", str(file), "down", "--volumes").exit_code == 0
    assert [volume.name for volume in server.world.volumes.volumes.values()] == ["theirs"]


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
    return {instance.name: instance.state for instance in server.world.instances.instances.values()}


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
