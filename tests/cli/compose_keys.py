"""Every key of the published schema of the Compose specification, tried on our reader: none may be dropped silently.

For each key two files are read that differ in it alone. It is carried out (the stacks differ), it is named (by a
warning or a refusal), or it is listed as making no difference (``NO_DIFFERENCE``). Part of ``compose_conformance.py``,
which has the schema.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hypeman.cli.compose import spec
from hypeman.cli.compose.keys import NO_DIFFERENCE, UNKNOWN
from hypeman.cli.compose.model import ComposeError, Stack

Schema = Mapping[str, Any]
_SKIPPED = ("jobs", "services.*.pre_start[]")
"""Refused as a whole; they repeat the keys of a service."""
_NEEDED: Mapping[str, Any] = {
    "services.*.build": {"context": "app"},
    "services.*.configs[]": {"source": "c"},
    "services.*.secrets[]": {"source": "s"},
    "services.*.build.secrets[]": {"source": "s"},
    "services.*.depends_on.*": {"condition": "service_started"},
    "services.*.develop.watch[]": {"action": "sync", "path": "app", "target": "/t"},
    "services.*.develop.watch[].exec": {"command": "ls"},
    "services.*.env_file[]": {"path": "variables"},
    "services.*.extends": {"service": "third"},
    "services.*.healthcheck": {"test": ["CMD", "true"]},
    "services.*.ports[]": {"target": 80},
    "services.*.ulimits.*": {"soft": 7, "hard": 7},
    "services.*.volumes[]": {"type": "volume", "source": "v", "target": "/v"},
    "services.*.volumes[].tmpfs": {},
    "include[]": {"path": "more.yaml"},
    "networks.*": {},
    "secrets.*": {"file": "variables"},
    "configs.*": {"content": "text"},
}
"""What a key stands beside, so that the file is valid without it."""
_BEFORE: Mapping[str, Any] = {
    "services.*.develop.watch[].exec": ("services.*.develop.watch[]", {"action": "sync+exec"}),
    "services.*.volumes[].bind": ("services.*.volumes[]", {"type": "bind", "source": "./app"}),
    "services.*.volumes[].tmpfs": ("services.*.volumes[]", {"type": "tmpfs"}),
    "services.*.volumes[].image": ("services.*.volumes[]", {"type": "image"}),
}
"""What else is needed further up."""
_VALUES: Mapping[str, Any] = {
    "volumes": {"v": {"name": "other"}}, "networks": {"n": {"enable_ipv6": True}},
    "secrets": {"s": {"file": "variables"}}, "services": {"web": {"image": "other"}},
    "configs": {"c": {"content": "other"}}, "configs.*.content": "other",
    "configs.*.environment": "VARIABLE", "configs.*.file": "variables",
    "secrets.*.environment": "VARIABLE", "secrets.*.file": "app/secret",
    "include": ["more.yaml"], "include[].path": "more2.yaml", "include[].project_directory": "app",
    "networks.*.enable_ipv4": False, "networks.*.driver": "macvlan", "name": "other", "version": "3",
    "services.*.build": "app", "services.*.build.context": "elsewhere", "services.*.build.network": "none",
    "services.*.build.secrets": ["s"], "services.*.configs": ["c"], "services.*.secrets": ["s"],
    "services.*.build.secrets[].source": "s2", "services.*.secrets[].source": "s2", "services.*.configs[].source": "c2",
    "services.*.configs[].target": "/etc/c", "services.*.configs[].mode": 0o600, "services.*.configs[].uid": "5",
    "services.*.configs[].gid": "5", "services.*.container_name": "own", "services.*.cpu_quota": 300000,
    "services.*.cpu_period": 1000, "services.*.depends_on": ["other"],
    "services.*.depends_on.*.condition": "service_healthy", "services.*.depends_on.*.required": False,
    "services.*.deploy.restart_policy.condition": "none", "services.*.deploy.replicas": 2,
    "services.*.deploy.resources.limits.cpus": 5, "services.*.deploy.resources.reservations.cpus": 5,
    "services.*.deploy.resources.limits.memory": "3G", "services.*.deploy.resources.reservations.memory": "3G",
    "services.*.develop.watch[].action": "restart", "services.*.develop.watch[].path": "elsewhere",
    "services.*.env_file": "variables", "services.*.env_file[].path": "app/secret",
    "services.*.env_file[].required": False, "services.*.label_file": "variables", "services.*.extends": "third",
    "services.*.extends.file": "other.yaml", "services.*.extends.service": "other",
    "services.*.ulimits.*.hard": 8, "services.*.ulimits.*.soft": 6, "services.*.storage_opt": {"size": "20G"},
    "services.*.deploy": {"resources": {"limits": {"cpus": 5}}}, "services.*.volumes[].volume": {"nocopy": True},
    "services.*.deploy.restart_policy": {"condition": "none"},
    "services.*.develop": {"watch": [{"action": "sync", "path": "app", "target": "/t"}]},
    "services.*.develop.watch": [{"action": "sync", "path": "app", "target": "/t"}],
    "services.*.healthcheck": {"test": ["CMD", "true"]}, "services.*.image": "another", "services.*.links": ["other"],
    "services.*.mem_limit": "3G", "services.*.mem_reservation": "3G", "services.*.network_mode": "none",
    "services.*.networks": ["n"], "services.*.networks.*.aliases": ["b"], "services.*.ports": ["80"],
    "services.*.ports[].target": 81, "services.*.ports[].published": "8080", "services.*.ports[].protocol": "udp",
    "services.*.ports[].host_ip": "127.0.0.1", "services.*.pull_policy": "always", "services.*.restart": "always",
    "services.*.shm_size": "1G", "services.*.volumes": ["v:/v"], "services.*.volumes[].source": "v2",
    "services.*.volumes[].target": "/w", "services.*.volumes[].type": "tmpfs", "services.*.sysctls": ["a.b=1"],
    "services.*.networks.*.priority": 5, "services.*.ulimits": {"nproc": 5}, "services.*.scale": 2,
    "services.*.volumes[].bind.create_host_path": False, "volumes.*.driver": "other",
    "services.*.depends_on.*.restart": True, "services.*.healthcheck.disable": True,
}  # fmt: skip
"""Of keys for which the first value that fits the schema is not a useful one."""
_FILES = {
    "variables": "A=1\n",
    "app/secret": "B=2\n",
    "app/Dockerfile": "FROM scratch\n",
    "more.yaml": "services: {more: {image: y, volumes: ['./app:/a']}}",
    "more2.yaml": "services: {more2: {image: y}}",
    "other.yaml": "services: {other: {image: z}, third: {image: w, user: '6'}}",
}


def written(folder: Path) -> Path:
    """``folder`` with the files that the cases name."""
    for name, text in _FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def keys_of(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The path of each key, and its schema. ``*`` stands for a name, ``[]`` for an entry."""
    seen: set[str] = set()
    for path, node in _walk(schema, schema, "", frozenset()):
        if path not in seen and not path.startswith(_SKIPPED):
            seen.add(path)
            yield path, node


def _walk(root: Schema, node: Schema, path: str, within: frozenset[str]) -> Iterator[tuple[str, Schema]]:
    if reference := node.get("$ref"):
        if reference not in within:
            yield from _walk(root, _resolved(root, node), path, within | {reference})
        return
    for kind in ("oneOf", "anyOf", "allOf"):
        for one in node.get(kind, ()):
            yield from _walk(root, one, path, within)
    dot = f"{path}." if path else ""
    for key, inside in node.get("properties", {}).items():
        yield dot + key, inside
        yield from _walk(root, inside, dot + key, within)
    names = [inside for key, inside in node.get("patternProperties", {}).items() if key != "^x-"]
    if isinstance(more := node.get("additionalProperties"), Mapping):
        names.append(more)
    for inside in names:
        yield from _walk(root, inside, f"{dot}*", within)
    if isinstance(items := node.get("items"), Mapping):
        yield from _walk(root, items, f"{path}[]", within)


def _resolved(root: Schema, node: Schema) -> Schema:
    while reference := node.get("$ref"):
        found: Any = root
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def _value(root: Schema, path: str, node: Schema) -> Any:
    """One that asks for something."""
    if path in _VALUES:
        return copy.deepcopy(_VALUES[path])
    node = _resolved(root, node)
    for kind in ("oneOf", "anyOf", "allOf"):
        if kind in node:
            return _value(root, "", node[kind][0])
    if "enum" in node:
        return node["enum"][0]
    kinds = node.get("type", "object")
    kind = kinds if isinstance(kinds, str) else next(kind for kind in kinds if kind != "null")
    match kind:
        case "string":
            return "7s" if node.get("format") == "duration" else "7"
        case "number" | "integer":
            return 7
        case "boolean":
            return True
        case "array":
            return [_value(root, "", node.get("items", {"type": "string"}))]
    required = {key: _value(root, "", node["properties"][key]) for key in node.get("required", ())}
    if required:
        return required
    if properties := node.get("properties"):
        key = next(iter(properties))
        return {key: _value(root, "", properties[key])}
    return {"k": "7"}


def _tree(path: str, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file without the key, and with it."""
    tree: dict[str, Any] = {
        "name": "case",
        "services": {"web": {"image": "x"}, "other": {"image": "y"}, "third": {"image": "z", "user": "5"}},
        "volumes": {"v": {}, "v2": {}},
        "networks": {"n": {}},
        "secrets": {name: {"file": file, "x-inject": [{"hosts": ["a.b"], "as": {"header": "X", "format": "${value}"}}]}
                    for name, file in (("s", "variables"), ("s2", "app/secret"))},
        "configs": {"c": {"content": "text"}, "c2": {"content": "two"}},
    }  # fmt: skip
    names = {"services": "web", "volumes": "v", "networks": "n", "secrets": "s", "configs": "c"}
    needed = {before: more for below, (before, more) in _BEFORE.items() if f"{path}.".startswith(f"{below}.")}
    if path.startswith("configs"):
        tree["services"]["web"]["configs"] = ["c"]
    if path.startswith("secrets"):
        tree["services"]["web"]["secrets"] = ["s"]
    parts = path.split(".")
    place: Any = tree
    here = ""
    for at, part in enumerate(parts[:-1]):
        here = f"{here}.{part}" if here else part
        if part == "*":
            of = {"networks": "n", "depends_on": "other", "ulimits": "nproc"}
            key = names.get(parts[0], "k") if at == 1 else of.get(parts[at - 1], "k")
        else:
            key = part.removesuffix("[]")
        inside = {**copy.deepcopy(_NEEDED.get(here, {})), **needed.get(here, {})}
        if part.endswith("[]"):
            place[key] = [inside]
            place = place[key][0]
        else:
            found = place.setdefault(key, {})
            found.update({name: one for name, one in inside.items() if name not in found})
            place = found
    without = copy.deepcopy(tree)
    key = parts[-1]
    if here == "configs.*" and key in ("environment", "file"):
        del place["content"]
    if here == "secrets.*" and key == "environment":
        del place["file"]
    if (path, key) == ("services.*.depends_on.*.required", "required"):
        place_of = tree["services"]["web"]["depends_on"]
        place_of["gone"] = place_of.pop("other")
        place = place_of["gone"]
    if here == "services.*.env_file[]" and key == "required":
        place["path"] = "gone"
    place[key] = value
    return without, tree


def dropped(schema: Schema, folder: Path) -> list[str]:
    """Keys that make no difference, are not named, and are not listed."""
    return [path for path, node in keys_of(schema) if not _is_known(path, _value(schema, path, node), folder)]


def _is_known(path: str, value: Any, folder: Path) -> bool:
    without, tree = _tree(path, value)
    before, after = _read(without, folder), _read(tree, folder)
    names = [part.removesuffix("[]") for part in path.split(".") if part != "*"]
    below = names[1:] if names[0] == "services" and names[1:] else names
    if isinstance(after, str):
        return any(name in after for name in below) and UNKNOWN not in after
    if isinstance(before, str) or before != after:
        return True
    if any(f".{name} is ignored" in warning for name in below for warning in after.warnings):
        return True
    return any(name in NO_DIFFERENCE.get(".".join(names[:at]), ()) for at, name in enumerate(names))


def _read(tree: dict[str, Any], folder: Path) -> Stack | str:
    try:
        stack = spec.parse(copy.deepcopy(tree), folder, {"VARIABLE": "value"})
        stack.ordered()
    except ComposeError as error:
        return str(error)
    return stack
