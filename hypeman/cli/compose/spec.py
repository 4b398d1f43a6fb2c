"""Files of the Compose specification (``compose.yaml``), as far as a VM can do what they say. Pure, but for env files.

Every key is either carried out or refused by name: none is silently dropped, except those in HARMLESS, which make no
difference here.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hypeman.cli.compose.model import ComposeError, Service, Stack, Volume, in_strings
from hypeman.cli.policies import docker_restart
from hypeman.units import format_size, parse_size

DEFAULT_VOLUME_GB = 10
HARMLESS = frozenset(["container_name", "init", "stdin_open", "tty", "expose", "logging", "pull_policy", "stop_signal"])
"""Keys that change nothing for a VM, or what is so anyway."""
_KEYS = frozenset(
    """image command entrypoint environment env_file ports volumes depends_on restart healthcheck deploy mem_limit cpus
    hostname user working_dir labels profiles platform""".split()  # noqa: SIM905
)
_INSTEAD = {
    "build": "compose does not build; run hypeman build -t NAME, and name it as image",
    "privileged": "a VM has a kernel of its own: root in it has every capability there",
    "network_mode": "each instance has its own network",
    "networks": "each instance has its own network; see network.guest_to_guest in the server's configuration",
    "secrets": "use environment, or credentials of `hypeman run`, which the guest never holds",
    "configs": "put the file into the image or a volume",
    "devices": "register them: hypeman device register",
    "extends": "write the service out",
}
_VARIABLE = re.compile(
    r"\$(?:\$|(?P<plain>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?:(?P<colon>:)?(?P<kind>[-?+])(?P<rest>[^{}]*))?\})"
)
_CONDITIONS = {
    "service_started": "started",
    "service_healthy": "healthy",
    "service_completed_successfully": "completed",
}


def parse(
    tree: Any, directory: Path, environ: Mapping[str, str] = os.environ, profiles: frozenset[str] = frozenset()
) -> Stack:
    """The stack of a decoded file. Raises ComposeError."""
    if not isinstance(tree, dict) or not isinstance(tree.get("services"), dict):
        raise ComposeError("the file has no services")
    environ = {**_dotenv(directory / ".env"), **environ}
    tree = in_strings(tree, lambda text: interpolated(text, environ))
    name = str(tree.get("name") or environ.get("COMPOSE_PROJECT_NAME") or directory.resolve().name)
    name = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-") or "stack"
    for key in tree.keys() - {"name", "version", "services", "volumes", "networks"}:
        if not str(key).startswith("x-"):
            raise ComposeError(f"{key} is not supported: {_INSTEAD.get(key, 'a VM cannot do it')}")
    volumes = {key: _volume(name, key, value) for key, value in (tree.get("volumes") or {}).items()}
    services = []
    for key, value in tree["services"].items():
        if not isinstance(value, dict):
            raise ComposeError(f"services.{key} must have keys")
        wanted = value.get("profiles") or []
        if not wanted or profiles & set(wanted):
            services.append(_Reader(name, key, value, directory, environ, volumes).service())
    return Stack(name, tuple(services), tuple(volumes.values()))


def interpolated(text: str, environ: Mapping[str, str]) -> str:
    """``text`` with ``$NAME``, ``${NAME}``, ``${NAME:-default}``, ``${NAME:?message}``, ``${NAME:+other}``, ``$$``
    replaced. With the colon an empty value counts as none. Raises ComposeError."""

    def replace(found: re.Match[str]) -> str:
        name = found["plain"] or found["name"]
        if name is None:
            return "$"
        value = environ.get(name, "")
        given = bool(value) if found["colon"] else name in environ
        match found["kind"]:
            case "-" if not given:
                return found["rest"]
            case "+":
                return found["rest"] if given else ""
            case "?" if not given:
                raise ComposeError(f"{name} is required: {found['rest'] or 'it is not set'}")
        return value

    return _VARIABLE.sub(replace, text)


def _dotenv(path: Path) -> dict[str, str]:
    return _env_file(path) if path.is_file() else {}


def _env_file(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise ComposeError(f"{path} cannot be read: {error}") from None
    found = {}
    for line in lines:
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not key.startswith("#"):
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            found[key.strip()] = value[1:-1] if quoted else value
    return found


def _volume(stack: str, key: str, value: Any) -> Volume:
    value = value or {}
    where = f"volumes.{key}"
    for field in value.keys() - {"name", "labels", "driver", "x-size"}:
        raise ComposeError(f"{where}.{field} is not supported")
    if value.get("driver", "local") != "local":
        raise ComposeError(f"{where}.driver: volumes are disks of this host")
    size = value.get("x-size")
    gigabytes = DEFAULT_VOLUME_GB if size is None else max(1, -(-parse_size(str(size)) // (1 << 30)))
    return Volume(key, str(value.get("name") or f"{stack}-{key}"), gigabytes)


class _Reader:
    """One service of a file."""

    def __init__(
        self,
        stack: str,
        key: str,
        value: dict[str, Any],
        directory: Path,
        environ: Mapping[str, str],
        volumes: dict[str, Volume],
    ) -> None:
        self._stack = stack
        self._key = key
        self._value = value
        self._directory = directory
        self._environ = environ
        self._volumes = volumes

    def service(self) -> Service:
        for key in self._value.keys() - _KEYS - HARMLESS:
            if not str(key).startswith("x-"):
                raise self._error(key, f"is not supported: {_INSTEAD.get(key, 'a VM cannot do it')}")
        if not self._value.get("image"):
            raise self._error("image", "is missing")
        name = f"{self._stack}-{self._key}".replace("_", "-")
        body = {
            "name": name,
            "image": self._value["image"],
            "platform": self._value.get("platform"),
            "entrypoint": self._words("entrypoint"),
            "cmd": self._words("command"),
            "env": self._environment(),
            "hostname": self._value.get("hostname") or self._key,
            "user": self._text("user"),
            "working_dir": self._value.get("working_dir"),
            "ports": [port for entry in self._value.get("ports") or [] for port in [self._port(entry)]],
            "restart_policy": self._restart(),
            "health_check": self._health(),
            **self._limits(),
        }
        return Service(
            key=self._key,
            name=name,
            body={field: value for field, value in body.items() if value not in (None, {}, [], "")},
            mounts=tuple(map(self._mount, self._value.get("volumes") or [])),
            depends_on=self._depends_on(),
        )

    def _error(self, field: str, message: str) -> ComposeError:
        return ComposeError(f"services.{self._key}.{field} {message}")

    def _text(self, field: str) -> str | None:
        value = self._value.get(field)
        return None if value is None else str(value)

    def _words(self, field: str) -> list[str] | None:
        value = self._value.get(field)
        if value is None:
            return None
        return shlex.split(value) if isinstance(value, str) else [str(word) for word in value]

    def _environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        files = self._value.get("env_file") or []
        for entry in [files] if isinstance(files, str | dict) else files:
            path = entry["path"] if isinstance(entry, dict) else entry
            required = not isinstance(entry, dict) or entry.get("required", True)
            if required or (self._directory / path).is_file():
                found |= _env_file(self._directory / path)
        given = self._value.get("environment") or {}
        pairs = given.items() if isinstance(given, dict) else (_pair(text) for text in given)
        for key, value in pairs:
            if value is None:
                if key in self._environ:
                    found[key] = self._environ[key]
            else:
                found[key] = str(value).lower() if isinstance(value, bool) else str(value)
        return found

    def _port(self, entry: Any) -> dict[str, Any]:
        from hypeman.cli.ports import parse_port

        if isinstance(entry, dict):
            known = {"target", "published", "protocol", "host_ip", "mode", "name", "app_protocol"}
            if entry.keys() - known or "target" not in entry:
                raise self._error("ports", f"{entry} is not supported")
            text = f"{entry.get('published', 0) or 0}:{entry['target']}/{entry.get('protocol', 'tcp')}"
            entry = f"{entry['host_ip']}:{text}" if entry.get("host_ip") else text
        try:
            return parse_port(str(entry))
        except Exception as error:
            raise self._error("ports", f"{entry!r}: {error}") from None

    def _mount(self, entry: Any) -> dict[str, Any]:
        if isinstance(entry, str):
            source, _, rest = entry.partition(":")
            path, _, mode = rest.partition(":")
            entry = {"type": "volume", "source": source, "target": path, "read_only": "ro" in mode.split(",")}
        source, target = str(entry.get("source", "")), str(entry.get("target", ""))
        if entry.get("type", "volume") != "volume" or source.startswith(("/", ".", "~")) or not target.startswith("/"):
            raise self._error(
                "volumes",
                f"{source or entry!r}: directories of the host are not shared with a VM; use a named volume, or put "
                "the files into the image",
            )
        if source not in self._volumes:
            raise self._error("volumes", f"there is no volume {source!r}")
        mount: dict[str, Any] = {"volume_id": self._volumes[source].name, "mount_path": target}
        return {**mount, **({"readonly": True} if entry.get("read_only") else {})}

    def _depends_on(self) -> dict[str, str]:
        given = self._value.get("depends_on") or {}
        if not isinstance(given, dict):
            return dict.fromkeys(given, "started")
        found = {}
        for key, value in given.items():
            condition = (value or {}).get("condition", "service_started")
            if condition not in _CONDITIONS:
                raise self._error("depends_on", f"{key}: there is no condition {condition!r}")
            found[key] = _CONDITIONS[condition]
        return found

    def _restart(self) -> dict[str, Any] | None:
        text = self._value.get("restart")
        try:
            return docker_restart("no" if text is False else self._text("restart"))  # YAML reads no as false
        except click.BadParameter as error:
            raise self._error("restart", f"{text!r} {error.message}") from None

    def _health(self) -> dict[str, Any] | None:
        check = self._value.get("healthcheck")
        if not check or check.get("disable"):
            return None
        known = {"test", "interval", "timeout", "retries", "start_period", "disable", "start_interval"}
        if check.keys() - known:
            raise self._error("healthcheck", f"{', '.join(sorted(check.keys() - known))} is not supported")
        test = check.get("test")
        if isinstance(test, str):
            command = ["/bin/sh", "-c", test]
        elif isinstance(test, list) and test[:1] == ["CMD-SHELL"]:
            command = ["/bin/sh", "-c", *test[1:]]
        elif isinstance(test, list) and test[:1] == ["CMD"]:
            command = [str(word) for word in test[1:]]
        elif test == ["NONE"]:
            return None
        else:
            raise self._error("healthcheck", "test must be a text, or a list that begins with CMD or CMD-SHELL")
        fields = {
            "interval": check.get("interval"),
            "timeout": check.get("timeout"),
            "start_period": check.get("start_period"),
            "failure_threshold": check.get("retries"),
        }
        given = {key: value for key, value in fields.items() if value is not None}
        return {"type": "exec", "exec": {"command": command}, **given}

    def _limits(self) -> dict[str, Any]:
        deploy = self._value.get("deploy") or {}
        resources = (deploy.get("resources") or {}).get("limits") or {}
        if int(deploy.get("replicas", 1)) != 1:
            raise self._error("deploy", "replicas must be 1: an instance has one name")
        memory = resources.get("memory") or self._value.get("mem_limit")
        cpus = resources.get("cpus") or self._value.get("cpus")
        found: dict[str, Any] = {}
        if memory is not None:
            found["size"] = format_size(parse_size(str(memory)))
        if cpus is not None:
            found["vcpus"] = max(1, -(-round(float(cpus) * 1000) // 1000))
        return found


def _pair(text: str) -> tuple[str, str | None]:
    key, equals, value = str(text).partition("=")
    return key, value if equals else None
