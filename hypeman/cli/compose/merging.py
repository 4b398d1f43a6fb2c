"""One tree from several files: ``include`` and ``extends`` of the Compose specification. Reads the files they name.

What a file says of paths is about its own folder: when it is taken into another file, they are made absolute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypeman.cli.compose.model import ComposeError, Tagged

_MAX_DEPTH = 16
_RESOURCES = ("services", "volumes", "networks", "secrets", "configs")
_REPLACED = frozenset(["command", "entrypoint", "test"])
"""Lists that are taken as a whole; others are put together."""
_BY_TARGET = frozenset(["volumes", "configs", "secrets"])
"""Lists of a service in which an entry replaces the one for the same place in the guest."""
_BY_NAME = frozenset(["environment", "labels", "args", "annotations", "extra_hosts", "sysctls"])
"""Mappings that may be written as a list of ``NAME=VALUE``."""

Read = Callable[[Path], Any]
"""The decoded and interpolated content of a file; raises ComposeError."""


def expanded(tree: dict[str, Any], directory: Path, read: Read, depth: int = 0) -> dict[str, Any]:
    """``tree`` with what it includes, and with each service that extends another one written out."""
    if depth > _MAX_DEPTH:
        raise ComposeError(f"include is nested more than {_MAX_DEPTH} levels deep")
    included: dict[str, Any] = {}
    includes = settled(tree.get("include")) or []
    if not isinstance(includes, list):
        raise ComposeError(f"include must be a list, as in include: [{includes if isinstance(includes, str) else '…'}]")
    for entry in includes:
        _take_in(included, _included(entry, directory, read, depth), str(entry))
    own = _opened({key: value for key, value in tree.items() if key != "include"})
    services = {
        key: _extended(key, value, own, directory, read, ()) for key, value in (own.get("services") or {}).items()
    }
    own["services"] = services
    own = settled(own)
    _take_in(included, {key: own.get(key) or {} for key in _RESOURCES}, "the file")
    return {**own, **{key: value for key, value in included.items() if value or key in own}}


def merged(base: Any, more: Any, key: str = "") -> Any:
    """``base`` overridden by ``more``: mappings by their keys, lists one after the other, everything else replaced."""
    if key in _BY_NAME:
        base, more = by_name(base), by_name(more)
    if key == "depends_on" and (isinstance(base, dict) or isinstance(more, dict)):
        base, more = _conditions(base), _conditions(more)
    if isinstance(base, Mapping) and isinstance(more, Mapping):
        return {**base, **{name: _over(base[name], more[name], name) if name in base else more[name] for name in more}}
    if isinstance(base, list) and isinstance(more, list) and key not in _REPLACED:
        if key in _BY_TARGET:
            targets = {_target(each) for each in more}
            base = [each for each in base if _target(each) not in targets]
        return [*base, *(each for each in more if each not in base)]
    return more


def _over(base: Any, more: Any, key: str) -> Any:
    """Tags stay until ``settled``: what the result is merged into later has to know of them, too."""
    if isinstance(more, Tagged):
        return more
    if isinstance(base, Tagged):
        return Tagged(more if base.reset else merged(base.value, more, key), reset=False)
    return merged(base, more, key)


def settled(tree: Any) -> Any:
    """``tree`` without what is reset, and with what overrides in its place."""
    if isinstance(tree, Tagged):
        return None if tree.reset else settled(tree.value)
    if isinstance(tree, dict):
        return {key: settled(value) for key, value in tree.items() if not _is_reset(value)}
    if isinstance(tree, list):
        return [settled(value) for value in tree if not _is_reset(value)]
    return tree


def _is_reset(value: Any) -> bool:
    return isinstance(value, Tagged) and value.reset


def _opened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` without tags at its keys and its resources; those inside of services stay for ``extends``."""
    found = _untagged(tree)
    for kind in _RESOURCES:
        if isinstance(found.get(kind), dict):
            found[kind] = _untagged(found[kind])
    return found


def _untagged(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.value if isinstance(value, Tagged) else value for key, value in tree.items() if not _is_reset(value)
    }


def _target(entry: Any) -> str:
    """Where in the guest an entry of a service's volumes, configs or secrets is."""
    if isinstance(entry, dict):
        return str(entry.get("target") or entry.get("source"))
    parts = str(entry).split(":")
    return parts[1] if len(parts) > 1 else parts[0]


def by_name(value: Any) -> Any:
    """A list of ``NAME=VALUE`` as a mapping; None for a name alone."""
    if not isinstance(value, list):
        return value
    return dict(map(pair, value))


def pair(text: Any) -> tuple[str, str | None]:
    """Name and value of ``NAME=VALUE``; None for a name alone."""
    name, equals, value = str(text).partition("=")
    return name, value if equals else None


def _conditions(value: Any) -> Any:
    return {key: {"condition": "service_started"} for key in value} if isinstance(value, list) else value


def _take_in(found: dict[str, Any], more: Mapping[str, Any], where: str) -> None:
    """Add the resources of ``more``; a name that is there already is an error unless it says the same."""
    for kind in _RESOURCES:
        known = found.setdefault(kind, {})
        for name, value in (more.get(kind) or {}).items():
            if name in known and known[name] != value:
                raise ComposeError(f"{kind}.{name} of {where} is there already, with other content")
            known[name] = value


def _included(entry: Any, directory: Path, read: Read, depth: int) -> dict[str, Any]:
    fields = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict) or "path" not in fields or fields.keys() - {"path", "project_directory"}:
        raise ComposeError(f"include: {entry!r} must be a path, or have path and project_directory")
    paths = [fields["path"]] if isinstance(fields["path"], str) else list(fields["path"])
    tree: dict[str, Any] = {}
    for path in paths:
        tree = merged(tree, _tree(directory / path, read))
    folder = directory / fields.get("project_directory", Path(paths[0]).parent)
    return anchored(expanded(tree, folder, read, depth + 1), folder)


def _extended(
    key: str, value: Any, tree: Mapping[str, Any], directory: Path, read: Read, seen: tuple[tuple[Path, str], ...]
) -> Any:
    if not isinstance(value, dict) or "extends" not in value or _is_reset(value["extends"]):
        return settled(value)
    extends = settled(value["extends"])
    extends = {"service": extends} if isinstance(extends, str) else extends
    if not isinstance(extends, dict) or "service" not in extends or extends.keys() - {"service", "file"}:
        raise ComposeError(f"services.{key}.extends must have service, and file if it is in another one")
    name, folder, file = str(extends["service"]), directory, tree
    path = seen[-1][0] if seen else directory  # the folder stands for the first file
    if extends.get("file"):
        path = (directory / extends["file"]).resolve()
        folder, file = (directory / extends["file"]).parent, _tree(path, read)
    if (place := (path, name)) in seen:
        raise ComposeError(f"services.{key}.extends: {name} extends itself")
    base = (file.get("services") or {}).get(name)
    if not isinstance(base, dict):
        raise ComposeError(f"services.{key}.extends: there is no service {name!r}")
    base = _extended(name, base, file, folder, read, (*seen, place))
    if folder != directory:
        base = anchored({"services": {name: base}}, folder)["services"][name]
    return settled(merged(base, {field: one for field, one in value.items() if field != "extends"}))


def _tree(path: Path, read: Read) -> dict[str, Any]:
    tree = read(path)
    if not isinstance(tree, dict):
        raise ComposeError(f"{path} has no services")
    return _opened(tree)


def anchored(tree: dict[str, Any], directory: Path) -> dict[str, Any]:
    """``tree`` with the paths of its services, secrets and configs absolute."""
    found = dict(tree)
    found["services"] = {key: _anchored_service(one, directory) for key, one in (tree.get("services") or {}).items()}
    for kind in ("secrets", "configs"):
        if resources := tree.get(kind):
            found[kind] = {key: _anchored_path(one, "file", directory) for key, one in resources.items()}
    return found


def _anchored_service(value: Any, directory: Path) -> Any:
    if not isinstance(value, dict):
        return value
    found = dict(value)
    if "env_file" in value:
        files = value["env_file"] if isinstance(value["env_file"], list) else [value["env_file"]]
        found["env_file"] = [
            {**file, "path": str(directory / file["path"])} if isinstance(file, dict) else str(directory / file)
            for file in files
        ]
    if "label_file" in value:
        labels = value["label_file"] if isinstance(value["label_file"], list) else [value["label_file"]]
        found["label_file"] = [str(directory / file) for file in labels]
    build = value.get("build")
    if isinstance(build, str):
        found["build"] = str(directory / build)
    elif isinstance(build, dict):
        found["build"] = {**build, "context": str(directory / build.get("context", "."))}
    if isinstance(value.get("volumes"), list):
        found["volumes"] = [_anchored_mount(entry, directory) for entry in value["volumes"]]
    develop = value.get("develop")
    if isinstance(develop, dict) and isinstance(develop.get("watch"), list):
        found["develop"] = {**develop, "watch": [_anchored_path(rule, "path", directory) for rule in develop["watch"]]}
    return found


def _anchored_mount(entry: Any, directory: Path) -> Any:
    """Sources that begin with a dot are directories here; all others are volumes or absolute."""
    if isinstance(entry, str):
        return str(directory / entry) if entry.startswith(".") else entry
    if isinstance(entry, dict) and entry.get("type") == "bind":
        return _anchored_path(entry, "source", directory)
    return entry


def _anchored_path(value: Any, field: str, directory: Path) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(field), str) or value[field].startswith("~"):
        return value
    return {**value, field: str(directory / value[field])}
