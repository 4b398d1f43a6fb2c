"""Files of the Compose specification (``compose.yaml``), as far as a VM can do what they say. Pure, but for env files.

Every key is carried out, ignored with a warning (IGNORED), or refused by name; none is silently dropped, except those
in HARMLESS, which make no difference here.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from hypeman.cli.compose.copies import copied_volume
from hypeman.cli.compose.merging import by_name, expanded
from hypeman.cli.compose.model import ComposeError, Service, Stack, Volume, in_strings
from hypeman.cli.compose.watching import Action, Rule
from hypeman.cli.policies import docker_restart
from hypeman.errors import InvalidRequest
from hypeman.ids import stack_member
from hypeman.units import format_size, parse_size

DEFAULT_VOLUME_GB = 10
MAX_FILE = 1 << 20
MAX_NODES = 100_000
HARMLESS = frozenset(
    """container_name init stdin_open tty expose logging pull_policy stop_signal cap_add links attach annotations
    isolation cgroup cgroup_parent oom_score_adj""".split()  # noqa: SIM905
)
"""Keys that change nothing for a VM, or what is so anyway."""
IGNORED = {
    "stop_grace_period": "the server decides how long a guest may take to stop",
    "cap_drop": "the boundary is the VM's, and root in it has every capability",
    "security_opt": "the boundary is the VM's",
    "read_only": "the instance has a writable layer of its own",
    "tmpfs": "the directories are on the instance's own disk",
}
"""Keys that are left out with a warning: the service works without them."""
_KEYS = frozenset(
    """image build command entrypoint environment env_file ports volumes depends_on restart healthcheck deploy mem_limit
    cpus hostname user working_dir labels profiles platform networks network_mode secrets ulimits sysctls shm_size
    scale develop""".split()  # noqa: SIM905
)
_INSTEAD = {
    "privileged": "a VM has a kernel of its own: root in it has every capability there",
    "configs": "put the file into the image or a volume",
    "devices": "register them: hypeman device register",
    "extra_hosts": "guests look names up at the host; see network.domain in the server's configuration",
    "volumes_from": "name the volumes in both services",
    "pid": "each instance has a kernel of its own",
    "ipc": "each instance has a kernel of its own",
    "dns": "guests look names up at the host, which asks network.dns_server",
}
_TOP = frozenset(["name", "version", "services", "volumes", "networks", "secrets", "include"])
_NETWORK_KEYS = frozenset(["name", "driver", "driver_opts", "attachable", "labels", "enable_ipv6", "ipam"])
_BUILD_KEYS = frozenset(["context", "dockerfile", "args", "target", "labels", "tags", "platforms"])
_DEPLOY_KEYS = frozenset(
    """resources replicas restart_policy mode labels endpoint_mode placement update_config
    rollback_config""".split()  # noqa: SIM905
)
_VARIABLE = re.compile(
    r"\$(?:\$|(?P<plain>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?:(?P<colon>:)?(?P<kind>[-?+])(?P<rest>[^{}]*))?\})"
)
_CONDITIONS = {
    "service_started": "started",
    "service_healthy": "healthy",
    "service_completed_successfully": "completed",
}


def parse(
    tree: Any,
    directory: Path,
    environ: Mapping[str, str] = os.environ,
    profiles: frozenset[str] = frozenset(),
    name: str | None = None,
) -> Stack:
    """The stack of a decoded file, called ``name`` or as the file says. Raises ComposeError."""
    if not isinstance(tree, dict) or not isinstance(tree.get("services") or {}, dict):
        raise ComposeError("the file has no services")
    environ = {**_dotenv(directory / ".env"), **environ}

    _check_keys(tree, "")

    def read(path: Path) -> Any:
        return in_strings(read_yaml(path), lambda text: interpolated(text, environ))

    with _well_formed("the file"):
        tree = expanded(in_strings(tree, lambda text: interpolated(text, environ)), directory, read)
    if not tree["services"]:
        raise ComposeError("the file has no services")
    name = str(name or tree.get("name") or environ.get("COMPOSE_PROJECT_NAME") or directory.resolve().name)
    name = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-") or "stack"
    for key in sorted(_own(tree) - _TOP):
        raise ComposeError(f"{key} is not supported: {_INSTEAD.get(key, 'a VM cannot do it')}")
    with _well_formed("volumes"):
        volumes = {key: _volume(name, key, value) for key, value in (tree.get("volumes") or {}).items()}
    profiles |= frozenset(filter(None, environ.get("COMPOSE_PROFILES", "").split(",")))
    active = {}
    for key, value in tree["services"].items():
        if not isinstance(value, dict):
            raise ComposeError(f"services.{key} must have keys")
        with _well_formed(f"services.{key}.profiles"):
            wanted = frozenset(value.get("profiles") or [])
        if not wanted or profiles & wanted or "*" in profiles:
            active[str(key)] = value
    secrets, keys = tree.get("secrets") or {}, frozenset(active)
    readers = [_Reader(name, key, value, directory, environ, volumes, secrets, keys) for key, value in active.items()]
    with _well_formed("networks"):
        _assign_groups(tree, readers)
    services = []
    for reader in readers:
        with _well_formed(f"services.{reader.key}"):
            services.append(reader.service())
    return Stack(
        name,
        tuple(services),
        (*volumes.values(), *(volume for reader in readers for volume in reader.copies)),
        tuple(warning for reader in readers for warning in reader.warnings()),
    )


@contextmanager
def _well_formed(where: str) -> Iterator[None]:
    """Within the block, a value of another type than the specification asks for is a ComposeError."""
    try:
        yield
    except InvalidRequest as error:
        raise ComposeError(f"{where}: {error.message}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ComposeError(f"{where} does not follow the Compose specification: {error}") from error


def read_yaml(path: Path) -> Any:
    """Raises ComposeError."""
    import yaml

    try:
        if path.stat().st_size > MAX_FILE:
            raise ComposeError(f"{path} is larger than 1 MB")
        tree = yaml.safe_load(path.read_text())
        if _size_of(tree, {}) > MAX_NODES:
            raise ComposeError(f"{path} has more than {MAX_NODES} values once its aliases are written out")
    except RecursionError:
        raise ComposeError(f"{path} is nested too deeply") from None
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ComposeError(f"{path} cannot be read: {error}") from None
    return tree


def _size_of(tree: Any, known: dict[int, int]) -> int:
    """Values in ``tree`` with aliases written out: each is the same object as its anchor. Raises RecursionError for a
    value that contains itself."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        parts = tree.values() if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_size_of(part, known) for part in parts)
    return known[id(tree)]


def _assign_groups(tree: Mapping[str, Any], readers: Sequence[_Reader]) -> None:
    """A file that keeps some of its services apart by networks makes each network a group of guests. In all others no
    service has a group: each reaches the others, and those of other stacks."""
    networks = {reader.key: reader.networks() for reader in readers}
    known = tree.get("networks") or {}
    for key, value in known.items():
        fields = _own(value or {}) - _NETWORK_KEYS
        if fields - {"internal", "external"} or (value or {}).get("internal") or (value or {}).get("external"):
            raise ComposeError(
                f"networks.{key}: {', '.join(sorted(fields))} is not supported: instances are in the host's network; "
                "egress rules (hypeman update egress-rules) decide what they reach"
            )
    for key, names in networks.items():
        if missing := names - known.keys() - {"default"}:
            raise ComposeError(f"services.{key}.networks: there is no network {', '.join(sorted(missing))}")
    connected = [names for names in networks.values() if names]
    if tree.get("x-networks") != "shared" and any(not one & other for one, other in combinations(connected, 2)):
        for reader in readers:
            reader.groups = sorted(networks[reader.key])


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
    for field in _own(value) - {"name", "labels", "driver"}:
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
        secrets: Mapping[str, Any],
        others: frozenset[str],
    ) -> None:
        """``others``: the services that the stack has."""
        self._stack = stack
        self.key = self._key = key
        self._value = value
        self._secrets = secrets
        self._directory = directory
        self._environ = environ
        self._volumes = volumes
        self._others: frozenset[str] = others
        self.groups: list[str] = []
        """Of guests that the instance reaches."""
        self.copies: list[Volume] = []
        """Of directories here; known once ``service`` was called."""

    def service(self) -> Service:
        for key in sorted(_own(self._value) - _KEYS - HARMLESS - IGNORED.keys()):
            raise self._error(key, f"is not supported: {_INSTEAD.get(key, 'a VM cannot do it')}")
        name = stack_member(self._stack, self._key)
        build = self._build()
        image = self._value.get("image")
        if not image and not build:
            raise self._error("image", "is missing")
        if image and not isinstance(image, str):
            raise self._error("image", "must be a text")
        credentials, secrets = self._credentials()
        network = {
            **({"egress": {"enabled": True}} if credentials else {}),
            **({"groups": self.groups} if self.groups else {}),
            **({"enabled": False} if self._value.get("network_mode") == "none" else {}),
        }
        body = {
            "name": name,
            "image": self._value.get("image") or f"localhost/{name}:latest",
            "network": network,
            "credentials": credentials,
            "platform": self._value.get("platform"),
            "entrypoint": self._words("entrypoint"),
            "cmd": self._words("command"),
            "env": self._environment(),
            "hostname": self._value.get("hostname") or self._key.replace("_", "-"),
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
            mounts=tuple(mount for entry in self._value.get("volumes") or [] if (mount := self._mount(entry))),
            watch=self._watch(),
            depends_on=self._depends_on(),
            build=build,
            secrets=secrets,
            tags=self._tags(),
        )

    def warnings(self) -> list[str]:
        given = [key for key in IGNORED if self._value.get(key)]
        ignored = [f"services.{self._key}.{key} is ignored: {IGNORED[key]}" for key in given]
        return ignored + [
            f"services.{self._key}.volumes: the guest gets a copy of {each.source}" for each in self.copies
        ]

    def networks(self) -> frozenset[str]:
        """Those that it is in; none with ``network_mode: none``."""
        given = self._value.get("networks") or ["default"]
        if isinstance(given, dict):
            for name, fields in given.items():
                if fields and fields.keys() - {"priority"}:
                    raise self._error("networks", f"{name}: an instance's names are its own and its service's")
        if self._value.get("network_mode") and self._value.get("networks"):
            raise self._error("network_mode", "and networks exclude each other")
        mode = str(self._value.get("network_mode", "bridge"))
        if mode not in ("none", "bridge", "default"):
            raise self._error("network_mode", f"{mode}: each instance has its own network")
        return frozenset(() if mode == "none" else given)

    def _build(self) -> dict[str, Any]:
        given = self._value.get("build")
        if not given:
            return {}
        fields = {"context": given} if isinstance(given, str) else given
        if unknown := _own(fields) - _BUILD_KEYS:
            raise self._error("build", f"{', '.join(sorted(unknown))} is not supported: hypeman build has more options")
        args = by_name(fields.get("args") or {})
        context = str(fields.get("context", "."))
        if "://" in context or context.startswith("git@"):
            raise self._error("build", f"{context}: clone the repository, and name its directory")
        found = {
            "context": os.path.normpath(self._directory / context),
            "dockerfile": fields.get("dockerfile"),
            "target": fields.get("target"),
            "build_args": {
                key: self._environ.get(key, "") if value is None else str(value) for key, value in args.items()
            },
        }
        return {key: value for key, value in found.items() if value not in (None, {})}

    def _credentials(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Credentials of the secrets that the service names, and the variables with their real values: the guest holds
        stand-ins, so a secret must say into which requests it is put."""
        credentials, values = {}, {}
        for entry in self._value.get("secrets") or []:
            source = entry if isinstance(entry, str) else str(entry.get("source", ""))
            secret = self._secrets.get(source)
            if not isinstance(secret, dict):
                raise self._error("secrets", f"there is no secret {source!r}")
            inject = secret.get("x-inject")
            if not inject:
                raise self._error(
                    "secrets",
                    f"{source}: the guest does not hold secrets; x-inject of the secret says into which requests the "
                    "host puts it, as inject of a credential does",
                )
            target = source if isinstance(entry, str) else str(entry.get("target") or source)
            name = re.sub(r"[^A-Z0-9_]", "_", target.upper())
            credentials[name] = {"source": {"env": f"{name}_VALUE"}, "inject": inject}
            values[f"{name}_VALUE"] = self._secret_value(source, secret)
        return credentials, values

    def _secret_value(self, name: str, secret: Mapping[str, Any]) -> str:
        if "environment" in secret:
            if (value := self._environ.get(str(secret["environment"]))) is None:
                raise self._error("secrets", f"{name}: there is no variable {secret['environment']}")
            return value
        if "file" not in secret:
            raise self._error("secrets", f"{name}: file or environment says where its value is")
        try:
            return (self._directory / str(secret["file"])).read_text().strip()
        except (OSError, UnicodeError) as error:
            raise self._error("secrets", f"{name}: {error}") from None

    def _tags(self) -> dict[str, str]:
        found = {}
        if shm := self._value.get("shm_size"):
            found["hypeman.shm-size"] = format_size(parse_size(str(shm)))
        for name, value in (self._value.get("ulimits") or {}).items():
            limits = [value["soft"], value["hard"]] if isinstance(value, dict) else [value]
            found[f"hypeman.ulimit.{name}"] = ":".join(map(str, limits))
        for name, value in (by_name(self._value.get("sysctls")) or {}).items():
            found[f"hypeman.sysctl.{name}"] = str(value)
        return found

    def _error(self, field: str, message: str) -> ComposeError:
        return ComposeError(f"services.{self._key}.{field} {message}")

    def _text(self, field: str) -> str | None:
        value = self._value.get(field)
        return None if value is None else str(value)

    def _words(self, field: str) -> list[str] | None:
        return _words(self._value.get(field))

    def _environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        files = self._value.get("env_file") or []
        for entry in [files] if isinstance(files, str | dict) else files:
            path = entry["path"] if isinstance(entry, dict) else entry
            required = not isinstance(entry, dict) or entry.get("required", True)
            if required or (self._directory / path).is_file():
                found |= _env_file(self._directory / path)
        given = self._value.get("environment") or {}
        if not isinstance(given, dict | list):
            raise self._error("environment", "must be a mapping, or a list of NAME=VALUE")
        pairs = given.items() if isinstance(given, dict) else (_pair(text) for text in given)
        for key, value in pairs:
            if isinstance(value, dict | list):
                raise self._error("environment", f"{key} must be a text, a number or a boolean")
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
            if _own(entry) - known or "target" not in entry:
                raise self._error("ports", f"{entry} is not supported")
            text = f"{entry.get('published', 0) or 0}:{entry['target']}/{entry.get('protocol', 'tcp')}"
            entry = f"{entry['host_ip']}:{text}" if entry.get("host_ip") else text
        try:
            return parse_port(str(entry))
        except Exception as error:
            raise self._error("ports", f"{entry!r}: {error}") from None

    def _mount(self, entry: Any) -> dict[str, Any] | None:
        """None for an anonymous volume: what is written there is on the instance's own disk."""
        if isinstance(entry, str):
            if ":" not in entry and entry.startswith("/"):
                return None
            source, _, rest = entry.partition(":")
            path, _, mode = rest.partition(":")
            entry = {"type": "volume", "source": source, "target": path, "read_only": "ro" in mode.split(",")}
        source, target = str(entry.get("source", "")), str(entry.get("target", ""))
        if (kind := entry.get("type", "volume")) not in ("volume", "bind"):
            raise self._error(
                "volumes", f"{target}: {kind} is not supported; the directory is on the instance's own disk"
            )
        if kind == "bind" or source.startswith(("/", ".", "~")):
            return self._copied(source, target, entry, readonly=bool(entry.get("read_only")))
        if not target.startswith("/"):
            raise self._error("volumes", f"{entry!r}: {target!r} is not an absolute path of the guest")
        if source not in self._volumes:
            raise self._error("volumes", f"there is no volume {source!r}")
        mount: dict[str, Any] = {"volume_id": self._volumes[source].name, "mount_path": target}
        return {**mount, **({"readonly": True} if entry.get("read_only") else {})}

    def _copied(self, source: str, target: str, entry: Any, *, readonly: bool) -> dict[str, Any]:
        """A mount of a directory here: of a volume that is filled from it."""
        if not target.startswith("/"):
            raise self._error("volumes", f"{entry!r}: {target!r} is not an absolute path of the guest")
        if not source:
            raise self._error("volumes", f"{entry!r}: the source is missing")
        path = (self._directory / os.path.expanduser(source)).resolve()
        try:
            volume = copied_volume(self._stack, self._key, path, target, readonly=readonly)
        except ComposeError as error:
            raise self._error("volumes", str(error)) from None
        self.copies.append(volume)
        return {"volume_id": volume.name, "mount_path": target, **({"readonly": True} if readonly else {})}

    def _watch(self) -> tuple[Rule, ...]:
        develop = self._value.get("develop", {}) or {}
        if not isinstance(self._value.get("develop"), dict | None):
            raise self._error("develop", "must have keys")
        if unknown := _own(develop) - {"watch"}:
            raise self._error("develop", f"{', '.join(sorted(unknown))} is not supported")
        return tuple(self._watch_rule(rule) for rule in develop.get("watch") or [])

    def _watch_rule(self, given: Mapping[str, Any]) -> Rule:
        known = {"action", "path", "target", "ignore", "include", "exec", "initial_sync"}
        if unknown := _own(given) - known:
            raise self._error("develop.watch", f"{', '.join(sorted(unknown))} is not supported")
        try:
            action = Action(str(given.get("action")))
        except ValueError:
            raise self._error(
                "develop.watch", f"action must be one of {', '.join(Action)}, not {given.get('action')!r}"
            ) from None
        if not given.get("path"):
            raise self._error("develop.watch", f"{action}: path is missing")
        if action.syncs and not str(given.get("target") or "").startswith("/"):
            raise self._error("develop.watch", f"{action}: target must be an absolute path of the guest")
        if action is Action.REBUILD and not self._value.get("build"):
            raise self._error("develop.watch", "rebuild: the service has no build")
        command = given.get("exec") or {}
        if action is Action.SYNC_EXEC and not command.get("command"):
            raise self._error("develop.watch", f"{action}: exec.command is missing")
        if unknown := command.keys() - {"command"}:
            raise self._error("develop.watch", f"exec.{', '.join(sorted(unknown))} is not supported")
        return Rule(
            self._key,
            action,
            (self._directory / os.path.expanduser(str(given["path"]))).resolve(),
            str(given.get("target") or ""),
            _texts(given.get("ignore")),
            _texts(given.get("include")),
            tuple(_words(command.get("command")) or ()),
            bool(given.get("initial_sync")),
        )

    def _depends_on(self) -> dict[str, str]:
        given = self._value.get("depends_on") or {}
        links = (str(link).partition(":")[0] for link in self._value.get("links") or [])
        found = {key: "started" for key in links if key in self._others}
        if not isinstance(given, dict):
            return found | dict.fromkeys(given, "started")
        for key, value in given.items():
            if not (value or {}).get("required", True) and key not in self._others:
                continue
            condition = (value or {}).get("condition", "service_started")
            if condition not in _CONDITIONS:
                raise self._error("depends_on", f"{key}: there is no condition {condition!r}")
            found[key] = _CONDITIONS[condition]
        return found

    def _restart(self) -> dict[str, Any] | None:
        text = self._value.get("restart")
        policy = (self._value.get("deploy") or {}).get("restart_policy")
        if text is None and policy:
            condition = policy.get("condition", "any")
            text = {"any": "always", "on-failure": "on-failure", "none": "no"}.get(condition, condition)
            if text == "on-failure" and policy.get("max_attempts"):
                text = f"on-failure:{policy['max_attempts']}"
            return docker_restart(text)
        try:
            return docker_restart("no" if text is False else self._text("restart"))  # YAML reads no as false
        except click.BadParameter as error:
            raise self._error("restart", f"{text!r} {error.message}") from None

    def _health(self) -> dict[str, Any] | None:
        check = self._value.get("healthcheck")
        if not check or check.get("disable"):
            return None
        known = {"test", "interval", "timeout", "retries", "start_period", "disable", "start_interval"}
        if unknown := _own(check) - known:
            raise self._error("healthcheck", f"{', '.join(sorted(unknown))} is not supported")
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
        if unknown := _own(deploy) - _DEPLOY_KEYS:
            raise self._error("deploy", f"{', '.join(sorted(unknown))} is not supported")
        if ((deploy.get("resources") or {}).get("reservations") or {}).get("devices"):
            raise self._error("deploy", "devices: register them, and name them in hypeman run --device")
        if unknown := _own(deploy.get("resources") or {}) - {"limits", "reservations"}:
            raise self._error("deploy", f"resources.{', '.join(sorted(unknown))} is not supported")
        resources = (deploy.get("resources") or {}).get("limits") or {}
        if int(deploy.get("replicas", self._value.get("scale", 1))) != 1:
            raise self._error("deploy", "replicas must be 1: an instance has one name")
        memory = resources.get("memory") or self._value.get("mem_limit")
        cpus = resources.get("cpus") or self._value.get("cpus")
        found: dict[str, Any] = {}
        if memory is not None:
            found["size"] = format_size(parse_size(str(memory)))
        if cpus is not None:
            found["vcpus"] = max(1, -(-round(float(cpus) * 1000) // 1000))
        return found


def _check_keys(tree: Any, where: str) -> None:
    """Raises ComposeError for a key that is no text, as in ``services: {1: …}``."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in parts:
        if isinstance(tree, dict) and not isinstance(key, str):
            raise ComposeError(f"{where}{key}: a key must be a text; put it into quotes")
        _check_keys(value, f"{where}{key}.")


def _own(value: Mapping[str, Any]) -> set[str]:
    """Keys of the specification: those that begin with ``x-`` are the file's own."""
    return {str(key) for key in value if not str(key).startswith("x-")}


def _words(value: Any) -> list[str] | None:
    if value is None:
        return None
    return shlex.split(value) if isinstance(value, str) else [str(word) for word in value]


def _texts(value: Any) -> tuple[str, ...]:
    """A list, or one text that stands for it."""
    return (value,) if isinstance(value, str) else tuple(map(str, value or ()))


def _pair(text: str) -> tuple[str, str | None]:
    key, equals, value = str(text).partition("=")
    return key, value if equals else None
