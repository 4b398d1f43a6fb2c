"""One service of a Compose file. Reads env files, secrets, and what is copied."""

from __future__ import annotations

import base64
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from msgspec import Struct

from hypeman.cli.builds import cache_place
from hypeman.cli.compose.copies import copied_volume, file_volume
from hypeman.cli.compose.keys import left_out
from hypeman.cli.compose.merging import by_name, pair
from hypeman.cli.compose.model import ComposeError, CopiedFile, Service, Volume
from hypeman.cli.compose.watching import Action, Rule
from hypeman.cli.policies import docker_restart
from hypeman.errors import InvalidRequest
from hypeman.ids import check_tags, stack_member
from hypeman.units import format_size, parse_size

CONDITIONS = {
    "service_started": "started",
    "service_healthy": "healthy",
    "service_completed_successfully": "completed",
}
_RESTARTS = {"any": "always", "on-failure": "on_failure", "none": "never"}
_KEYS = frozenset(
    """image build command entrypoint environment env_file ports volumes depends_on restart healthcheck deploy mem_limit
    mem_reservation cpus cpu_count cpu_period cpu_quota hostname domainname user working_dir labels label_file profiles
    platform networks network_mode secrets configs ulimits sysctls shm_size scale develop links pull_policy
    storage_opt""".split()  # noqa: SIM905
)
_BUILD_KEYS = frozenset(
    """context dockerfile dockerfile_inline args target labels tags platforms no_cache pull cache_from cache_to
    provenance sbom network secrets""".split()  # noqa: SIM905
)
_CPU_PERIOD = 100_000
"""Microseconds: the kernel's."""


class Shared(Struct, frozen=True):
    """What the services of a file have in common."""

    stack: str
    directory: Path
    """Relative paths begin here."""
    environ: Mapping[str, str]
    volumes: Mapping[str, Volume]
    secrets: Mapping[str, Any]
    configs: Mapping[str, Any]
    services: frozenset[str]
    """Those that the stack has."""


@contextmanager
def well_formed(where: str) -> Iterator[None]:
    """Within the block, a value of another type than the specification asks for is a ComposeError."""
    try:
        yield
    except InvalidRequest as error:
        raise ComposeError(f"{where}: {error.message}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ComposeError(f"{where} does not follow the Compose specification: {error}") from error


class Reader:
    """One service of a file."""

    def __init__(self, key: str, value: dict[str, Any], shared: Shared) -> None:
        self.key = key
        self._value = value
        self._shared = shared
        self._stack = shared.stack
        self._directory = shared.directory
        self._environ = shared.environ
        self.groups: list[str] = []
        """Of guests that the instance reaches."""
        self.copies: list[Volume] = []
        """Of directories and files here; known once ``service`` was called."""
        self.warnings: list[str] = []
        """What is left out; known once ``service`` was called."""
        self._files: list[CopiedFile] = []

    def service(self) -> Service:
        self._sort_out("", self._value, _KEYS)
        self._note_pulls()
        name = stack_member(self._stack, self.key)
        build = self._build()
        image = self._value.get("image")
        if not image and not build:
            raise self._error("image", "is missing")
        if image and not isinstance(image, str):
            raise self._error("image", "must be a text")
        credentials, secrets = self._credentials()
        mounts = [mount for entry in self._value.get("volumes") or [] if (mount := self._mount(entry))]
        self._read_configs()
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
            "hostname": self._hostname(),
            "user": self._text("user"),
            "working_dir": self._value.get("working_dir"),
            "ports": [self._port(entry) for entry in self._value.get("ports") or []],
            "restart_policy": self._restart(),
            "health_check": self._health(),
            **self._limits(),
        }
        return Service(
            key=self.key,
            name=name,
            body={field: value for field, value in body.items() if value not in (None, {}, [], "")},
            mounts=(*mounts, *self._file_mounts()),
            watch=self._watch(),
            depends_on=self._depends_on(),
            build=build,
            build_secrets=self._build_secrets(),
            secrets=secrets,
            tags=self._tags(),
        )

    def _sort_out(self, below: str, value: Any, done: frozenset[str]) -> None:
        """Note what is left out of ``value``, which is ``below`` the service; refuse what cannot be done."""
        if not isinstance(value, Mapping):
            raise self._error(below, "must have keys")
        place = f"services.{below}" if below else "services"
        where = f"services.{self.key}" + (f".{below}" if below else "")
        self.warnings += left_out(place, where, value, done)

    def _warn(self, field: str, message: str) -> None:
        self.warnings.append(f"services.{self.key}.{field}{message}")

    def _note_pulls(self) -> None:
        """What of ``pull_policy`` is not done."""
        policy = str(self._value.get("pull_policy") or "missing")
        if policy not in ("missing", "if_not_present") and not (policy == "build" and self._value.get("build")):
            self._warn(
                "pull_policy",
                f" is ignored: images are pulled if they are missing; hypeman pull checks for newer ones, not {policy}",
            )

    def _hostname(self) -> str:
        name = str(self._value.get("hostname") or self.key.replace("_", "-"))
        domain = self._value.get("domainname")
        return f"{name}.{domain}" if domain else name

    def networks(self) -> frozenset[str]:
        """Those that it is in; none with ``network_mode: none``."""
        given = self._value.get("networks") or ["default"]
        if isinstance(given, dict):
            for fields in given.values():
                aliases = set((fields or {}).get("aliases") or ())
                known = {"aliases"} if aliases <= {self.key, stack_member(self._stack, self.key)} else set()
                self._sort_out("networks", fields or {}, frozenset(known))
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
        self._sort_out("build", fields, _BUILD_KEYS)
        args = by_name(fields.get("args") or {})
        context = str(fields.get("context", "."))
        if "://" in context or context.startswith("git@"):
            raise self._error("build", f"{context}: clone the repository, and name its directory")
        if fields.get("dockerfile") and fields.get("dockerfile_inline"):
            raise self._error("build", "dockerfile and dockerfile_inline exclude each other")
        if (network := fields.get("network")) not in (None, "default", "none"):
            raise self._error("build", f"network: {network}: a build has default or none")
        labels = by_name(fields.get("labels") or {})
        platforms = _texts(fields.get("platforms")) or _texts(self._value.get("platform"))
        found = {
            "context": os.path.normpath(self._directory / context),
            "dockerfile": fields.get("dockerfile"),
            "dockerfile_inline": fields.get("dockerfile_inline"),
            "target": fields.get("target"),
            "build_args": {
                key: self._environ.get(key, "") if value is None else str(value) for key, value in args.items()
            },
            "labels": {key: "" if value is None else _scalar(value) for key, value in labels.items()},
            "image_names": list(_texts(fields.get("tags"))),
            "platform": ",".join(platforms),
            "no_cache": "true" if fields.get("no_cache") else None,
            "pull": "true" if fields.get("pull") else None,
            "cache_from": [cache_place(text) for text in _texts(fields.get("cache_from"))],
            "cache_to": [cache_place(text) for text in _texts(fields.get("cache_to"))],
            "provenance": _attestation(fields.get("provenance")),
            "sbom": _attestation(fields.get("sbom")),
            "network": {"none": "isolated", "default": "egress"}.get(str(network)),
        }
        return {key: value for key, value in found.items() if value not in (None, {}, [], "")}

    def _build_secrets(self) -> dict[str, str]:
        """By their ids, in base64."""
        build = self._value.get("build")
        found = {}
        for entry in (build.get("secrets") or []) if isinstance(build, dict) else []:
            source, target = self._secret_names(entry)
            value = self._secret_value(source, self._secret(source))
            found[target] = base64.b64encode(value.encode()).decode()
        return found

    def _credentials(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Credentials of the secrets that the service names, and the variables with their real values: the guest holds
        stand-ins, so a secret must say into which requests it is put."""
        credentials, values = {}, {}
        for entry in self._value.get("secrets") or []:
            source, target = self._secret_names(entry)
            secret = self._secret(source)
            inject = secret.get("x-inject")
            if not inject:
                raise self._error(
                    "secrets",
                    f"{source}: the guest does not hold secrets; x-inject of the secret says into which requests the "
                    "host puts it, as inject of a credential does",
                )
            name = re.sub(r"[^A-Z0-9_]", "_", target.upper())
            credentials[name] = {"source": {"env": f"{name}_VALUE"}, "inject": inject}
            values[f"{name}_VALUE"] = self._secret_value(source, secret)
        return credentials, values

    def _secret_names(self, entry: Any) -> tuple[str, str]:
        """Of a secret: in the file, and where it is used."""
        if isinstance(entry, str):
            return entry, entry
        self._sort_out("secrets", entry, frozenset(["source", "target"]))
        source = str(entry.get("source", ""))
        return source, str(entry.get("target") or source)

    def _secret(self, name: str) -> dict[str, Any]:
        secret = self._shared.secrets.get(name)
        if not isinstance(secret, dict):
            raise self._error("secrets", f"there is no secret {name!r}")
        self.warnings += left_out("secrets", f"secrets.{name}", secret, frozenset(["environment", "file"]))
        return secret

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
        found = self._labels()
        if shm := self._value.get("shm_size"):
            found["hypeman.shm-size"] = format_size(parse_size(str(shm)))
        for name, value in (self._value.get("ulimits") or {}).items():
            limits = [value["soft"], value["hard"]] if isinstance(value, dict) else [value]
            found[f"hypeman.ulimit.{name}"] = ":".join(map(str, limits))
        for name, value in (by_name(self._value.get("sysctls")) or {}).items():
            found[f"hypeman.sysctl.{name}"] = str(value)
        return found

    def _labels(self) -> dict[str, str]:
        """Labels are tags of the instance, as far as they are legal ones."""
        given: dict[str, Any] = {}
        for path in _texts(self._value.get("label_file")):
            given |= env_file(self._directory / path)
        given |= by_name(self._value.get("labels")) or {}
        found: dict[str, str] = {}
        for name, value in given.items():
            text = "" if value is None else _scalar(value)
            try:
                found |= check_tags({name: text})
            except InvalidRequest as error:
                self._warn("labels", f" is ignored in part: {error.message}")
        return found

    def _error(self, field: str, message: str) -> ComposeError:
        return ComposeError(f"services.{self.key}.{field} {message}")

    def _text(self, field: str) -> str | None:
        value = self._value.get(field)
        return None if value is None else str(value)

    def _words(self, field: str) -> list[str] | None:
        return _words(self._value.get(field))

    def _environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        files = self._value.get("env_file") or []
        for entry in [files] if isinstance(files, str | dict) else files:
            if isinstance(entry, dict):
                self._sort_out("env_file", entry, frozenset(["path", "required"]))
            path = entry["path"] if isinstance(entry, dict) else entry
            required = not isinstance(entry, dict) or entry.get("required", True)
            if required or (self._directory / path).is_file():
                found |= env_file(self._directory / path)
        given = self._value.get("environment") or {}
        if not isinstance(given, dict | list):
            raise self._error("environment", "must be a mapping, or a list of NAME=VALUE")
        pairs = given.items() if isinstance(given, dict) else (pair(text) for text in given)
        for key, value in pairs:
            if isinstance(value, dict | list):
                raise self._error("environment", f"{key} must be a text, a number or a boolean")
            if value is None:
                if key in self._environ:
                    found[key] = self._environ[key]
            else:
                found[key] = _scalar(value)
        return found

    def _port(self, entry: Any) -> dict[str, Any]:
        from hypeman.cli.ports import parse_port

        if isinstance(entry, dict):
            self._sort_out("ports", entry, frozenset(["target", "published", "protocol", "host_ip"]))
            if "target" not in entry:
                raise self._error("ports", f"{entry}: target is missing")
            published = str(entry.get("published") or "0")
            host = "" if published == "0" else published
            text = f"{host}:{entry['target']}/{entry.get('protocol', 'tcp')}"
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
        kind = str(entry.get("type", "volume"))
        options = frozenset(["bind", "volume", "tmpfs"])
        if kind not in ("volume", "bind", "tmpfs"):
            raise self._error("volumes", f"{target}: {kind} is not supported: only volumes, directories and files are")
        self._sort_out("volumes", entry, frozenset(["type", "source", "target", "read_only"]) | options)
        for option in sorted(options & entry.keys()):
            self._sort_out(f"volumes.{option}", entry[option] or {}, frozenset())
        if kind == "tmpfs":
            self._warn("volumes", f": {target} is no tmpfs: the directory is on the instance's own disk")
            return None
        if kind == "bind" or source.startswith(("/", ".", "~")):
            return self._copied(source, target, entry, readonly=bool(entry.get("read_only")))
        if not target.startswith("/"):
            raise self._error("volumes", f"{entry!r}: {target!r} is not an absolute path of the guest")
        if not source:
            return None
        if source not in self._shared.volumes:
            raise self._error("volumes", f"there is no volume {source!r}")
        mount: dict[str, Any] = {"volume_id": self._shared.volumes[source].name, "mount_path": target}
        return {**mount, **({"readonly": True} if entry.get("read_only") else {})}

    def _copied(self, source: str, target: str, entry: Any, *, readonly: bool) -> dict[str, Any] | None:
        """A mount of a directory here: of a volume that is filled from it. Files are mounted together, at the end."""
        if not target.startswith("/"):
            raise self._error("volumes", f"{entry!r}: {target!r} is not an absolute path of the guest")
        if not source:
            raise self._error("volumes", f"{entry!r}: the source is missing")
        path = (self._directory / os.path.expanduser(source)).resolve()
        try:
            if path.is_file():
                return self._copied_file(path, target, readonly=readonly)
            volume = copied_volume(self._stack, self.key, path, target, readonly=readonly)
        except ComposeError as error:
            raise self._error("volumes", str(error)) from None
        self.copies.append(volume)
        if volume.source:
            self._warn("volumes", f": the guest gets a copy of {path}")
        else:
            self._warn("volumes", f": {path} does not exist: the guest gets an empty volume at {target}")
        return {"volume_id": volume.name, "mount_path": target, **({"readonly": True} if readonly else {})}

    def _copied_file(self, path: Path, target: str, *, readonly: bool) -> dict[str, Any] | None:
        about = path.stat()
        file = CopiedFile(_place(target), about.st_mode & 0o7777, about.st_uid, about.st_gid, str(path))
        self._warn("volumes", f": the guest gets a copy of {path}")
        if readonly:
            self._files.append(file)
            return None
        volume = file_volume(self._stack, self.key, (file,), readonly=False)
        self.copies.append(volume)
        return {"volume_id": volume.name, "mount_path": "/", "files": True}

    def _read_configs(self) -> None:
        for entry in self._value.get("configs") or []:
            fields = {"source": entry} if isinstance(entry, str) else entry
            self._sort_out("configs", fields, frozenset(["source", "target", "uid", "gid", "mode"]))
            source = str(fields.get("source", ""))
            config = self._shared.configs.get(source)
            if not isinstance(config, dict):
                raise self._error("configs", f"there is no config {source!r}")
            known = frozenset(["environment", "file", "content"])
            self.warnings += left_out("configs", f"configs.{source}", config, known)
            try:
                self._files.append(self._config(source, fields, config))
            except ComposeError as error:
                raise self._error("configs", f"{source}: {error}") from None

    def _config(self, name: str, fields: Mapping[str, Any], config: Mapping[str, Any]) -> CopiedFile:
        given = config.keys() & {"content", "environment", "file"}
        if len(given) != 1:
            raise ComposeError("one of content, environment and file says what is in it")
        mode = fields.get("mode", 0o444)
        source, content = "", ""
        if "file" in config:
            source = str(self._directory / str(config["file"]))
        elif "content" in config:
            content = str(config["content"])
        elif (value := self._environ.get(str(config["environment"]))) is not None:
            content = value
        else:
            raise ComposeError(f"there is no variable {config['environment']}")
        return CopiedFile(
            _place(str(fields.get("target") or f"/{name}")),
            int(mode, 8) if isinstance(mode, str) else int(mode),
            int(fields.get("uid", 0)),
            int(fields.get("gid", 0)),
            source,
            content,
        )

    def _file_mounts(self) -> list[dict[str, Any]]:
        """One volume for all files that are not written to."""
        if not self._files:
            return []
        places = [file.path for file in self._files]
        if twice := {place for place in places if places.count(place) > 1}:
            raise self._error("configs", f"there are two files for /{min(twice)}")
        try:
            volume = file_volume(self._stack, self.key, tuple(self._files), readonly=True)
        except ComposeError as error:
            raise self._error("configs", str(error)) from None
        self.copies.append(volume)
        return [{"volume_id": volume.name, "mount_path": "/", "readonly": True, "files": True}]

    def _watch(self) -> tuple[Rule, ...]:
        develop = self._value.get("develop", {}) or {}
        if not isinstance(self._value.get("develop"), dict | None):
            raise self._error("develop", "must have keys")
        self._sort_out("develop", develop, frozenset(["watch"]))
        return tuple(self._watch_rule(rule) for rule in develop.get("watch") or [])

    def _watch_rule(self, given: Mapping[str, Any]) -> Rule:
        known = frozenset(["action", "path", "target", "ignore", "include", "exec", "initial_sync"])
        self._sort_out("develop.watch", given, known)
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
        self._sort_out("develop.watch.exec", command, frozenset(["command"]))
        return Rule(
            self.key,
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
        found: dict[str, str] = {}
        for link in self._value.get("links") or []:
            name, _, alias = str(link).partition(":")
            if alias not in ("", name):
                raise self._error("links", f"{link}: a service has no other name than its own")
            if name in self._shared.services:
                found[name] = "started"
        if not isinstance(given, dict):
            return found | dict.fromkeys(given, "started")
        for key, value in given.items():
            self._sort_out("depends_on", value or {}, frozenset(["condition", "required"]))
            if not (value or {}).get("required", True) and key not in self._shared.services:
                continue
            condition = (value or {}).get("condition", "service_started")
            if condition not in CONDITIONS:
                raise self._error("depends_on", f"{key}: there is no condition {condition!r}")
            found[key] = CONDITIONS[condition]
        return found

    def _restart(self) -> dict[str, Any] | None:
        text = self._value.get("restart")
        policy = (self._value.get("deploy") or {}).get("restart_policy")
        try:
            if text is not None or not policy:
                return docker_restart("no" if text is False else self._text("restart"))  # YAML reads no as false
            self._sort_out("deploy.restart_policy", policy, frozenset(["condition", "delay", "max_attempts", "window"]))
            condition = str(policy.get("condition", "any"))
            plain = {"policy": _RESTARTS[condition]} if condition in _RESTARTS else docker_restart(condition) or {}
            more = {
                "backoff": policy.get("delay"),
                "max_attempts": policy.get("max_attempts"),
                "stable_after": policy.get("window"),
            }
            return {**plain, **{key: value for key, value in more.items() if value is not None}}
        except click.BadParameter as error:
            raise self._error("restart", f"{text!r} {error.message}") from None

    def _health(self) -> dict[str, Any] | None:
        check = self._value.get("healthcheck")
        if not check or check.get("disable"):
            return None
        known = ["test", "interval", "timeout", "retries", "start_period", "disable"]
        self._sort_out("healthcheck", check, frozenset(known))
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
        self._sort_out("deploy", deploy, frozenset(["resources", "replicas", "restart_policy"]))
        resources = deploy.get("resources") or {}
        self._sort_out("deploy.resources", resources, frozenset(["limits", "reservations"]))
        limits, reserved = resources.get("limits") or {}, resources.get("reservations") or {}
        self._sort_out("deploy.resources.limits", limits, frozenset(["memory", "cpus"]))
        self._sort_out("deploy.resources.reservations", reserved, frozenset(["memory", "cpus"]))
        for field, count in (("deploy.replicas", deploy.get("replicas")), ("scale", self._value.get("scale"))):
            if count is not None and int(count) != 1:
                raise self._error(field, "must be 1: an instance has one name; write the services out")
        if self._value.get("cpu_period") and not self._value.get("cpu_quota"):
            self._warn("cpu_period", " is ignored: it says something together with cpu_quota")
        memories = (limits.get("memory"), self._value.get("mem_limit"), reserved.get("memory"))
        memory = next((one for one in (*memories, self._value.get("mem_reservation")) if one), None)
        cpus = next((one for one in (limits.get("cpus"), self._cpus(), reserved.get("cpus")) if one), None)
        disk = self._value.get("storage_opt") or {}
        self._sort_out("storage_opt", disk, frozenset(["size"]))
        found: dict[str, Any] = {}
        if memory is not None:
            found["size"] = format_size(parse_size(str(memory)))
        if cpus is not None:
            found["vcpus"] = max(1, -(-round(float(cpus) * 1000) // 1000))
        if disk.get("size"):
            found["overlay_size"] = format_size(parse_size(str(disk["size"])))
        return found

    def _cpus(self) -> Any:
        """Processors, in each of the ways in which a file can say how many."""
        if quota := self._value.get("cpu_quota"):
            return float(quota) / float(self._value.get("cpu_period") or _CPU_PERIOD)
        return self._value.get("cpus") or self._value.get("cpu_count")


def env_file(path: Path) -> dict[str, str]:
    """Lines of NAME=VALUE. Raises ComposeError."""
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


def _place(target: str) -> str:
    """The path of a file in the guest, below the root. Raises ComposeError."""
    normal = os.path.normpath(target).lstrip("/")
    if not target.startswith("/") or not normal or ".." in target.split("/") or target.endswith("/"):
        raise ComposeError(f"{target!r} is not an absolute path of a file in the guest")
    return normal


def _words(value: Any) -> list[str] | None:
    if value is None:
        return None
    return shlex.split(value) if isinstance(value, str) else [str(word) for word in value]


def _texts(value: Any) -> tuple[str, ...]:
    """A list, or one text that stands for it."""
    return (value,) if isinstance(value, str) else tuple(map(str, value or ()))


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _attestation(value: Any) -> str | None:
    """``provenance`` and ``sbom``: a text, or a boolean."""
    return None if value is None else _scalar(value)
