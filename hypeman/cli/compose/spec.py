"""Files of the Compose specification (``compose.yaml``), as far as a VM can do what they say. Reads what they name.

Every key is carried out, left out with a warning, or refused with what to do instead; ``keys.py`` has the tables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Any

from hypeman.cli.compose.keys import left_out
from hypeman.cli.compose.merging import expanded, merged
from hypeman.cli.compose.model import ComposeError, Stack, Tagged, Volume, in_strings
from hypeman.cli.compose.service import Reader, Shared, env_file, well_formed
from hypeman.units import parse_size

DEFAULT_VOLUME_GB = 10
MAX_FILE = 1 << 20
MAX_NODES = 100_000
_TOP = frozenset(["name", "services", "volumes", "networks", "secrets", "configs", "include"])
_RESOURCES = {
    "networks": frozenset[str](),
    "volumes": frozenset(["name", "driver", "external"]),
}
"""What of them is carried out."""
_PLAIN_DRIVERS = ("bridge", "overlay", "default")
_VARIABLE = re.compile(
    r"\$(?:\$|(?P<plain>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?:(?P<colon>:)?(?P<kind>[-?+])(?P<rest>[^{}]*))?\})"
)


def read_all(paths: Sequence[Path]) -> Any:
    """One tree of several files, each over those before it. Raises ComposeError."""
    trees = [read_yaml(path) for path in paths]
    for path, tree in zip(paths, trees, strict=True):
        if len(paths) > 1 and not isinstance(tree, dict):
            raise ComposeError(f"{path} has no services")
        _check_keys(tree, "")
    return reduce(merged, trees)


def parse(
    tree: Any,
    directory: Path,
    environ: Mapping[str, str] = os.environ,
    profiles: frozenset[str] = frozenset(),
    name: str | None = None,
) -> Stack:
    """The stack of a decoded file, called ``name`` or as the file says. Raises ComposeError."""
    if not isinstance(tree, dict) or not isinstance(tree.get("services") or {}, dict | Tagged):
        raise ComposeError("the file has no services")
    environ = {**_dotenv(directory / ".env"), **environ}

    _check_keys(tree, "")

    def read(path: Path) -> Any:
        return in_strings(read_yaml(path), lambda text: interpolated(text, environ))

    with well_formed("the file"):
        tree = expanded(in_strings(tree, lambda text: interpolated(text, environ)), directory, read)
    if not tree["services"]:
        raise ComposeError("the file has no services")
    name = str(name or tree.get("name") or environ.get("COMPOSE_PROJECT_NAME") or directory.resolve().name)
    name = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-") or "stack"
    warnings = list(left_out("", "", tree, _TOP))
    for kind, known in _RESOURCES.items():
        with well_formed(kind):
            warnings += _left_out_of(kind, tree.get(kind) or {}, known)
    with well_formed("volumes"):
        volumes = {key: _volume(name, key, value) for key, value in (tree.get("volumes") or {}).items()}
    profiles |= frozenset(filter(None, environ.get("COMPOSE_PROFILES", "").split(",")))
    active = {}
    for key, value in tree["services"].items():
        if not isinstance(value, dict):
            raise ComposeError(f"services.{key} must have keys")
        with well_formed(f"services.{key}.profiles"):
            wanted = frozenset(value.get("profiles") or [])
        if not wanted or profiles & wanted or "*" in profiles:
            active[str(key)] = value
    secrets, configs = tree.get("secrets") or {}, tree.get("configs") or {}
    shared = Shared(name, directory, environ, volumes, secrets, configs, frozenset(active))
    readers = [Reader(key, value, shared) for key, value in active.items()]
    with well_formed("networks"):
        _assign_groups(tree, readers)
    services = []
    for reader in readers:
        with well_formed(f"services.{reader.key}"):
            services.append(reader.service())
    copies = [volume for reader in readers for volume in reader.copies]
    _check_names([*volumes.values(), *copies])
    return Stack(
        name,
        tuple(services),
        (*volumes.values(), *copies),
        (*warnings, *(warning for reader in readers for warning in reader.warnings)),
    )


def _check_names(volumes: Iterable[Volume]) -> None:
    """Raises ComposeError if two volumes would be the same one."""
    known: dict[str, Volume] = {}
    for volume in volumes:
        first = known.setdefault(volume.name, volume)
        if first is not volume and (first.copied or volume.copied):
            raise ComposeError(
                f"two volumes would have the name {volume.name}: one of {first.copied or first.key}, one of "
                f"{volume.copied or volume.key}; give the service or the volume another name"
            )


def _left_out_of(kind: str, resources: Mapping[str, Any], known: frozenset[str]) -> Iterator[str]:
    for key, value in resources.items():
        harmless = {"driver"} if kind == "networks" and (value or {}).get("driver") in _PLAIN_DRIVERS else set()
        yield from left_out(kind, f"{kind}.{key}", value or {}, known | harmless)


def read_yaml(path: Path) -> Any:
    """Raises ComposeError."""
    import yaml

    try:
        if path.stat().st_size > MAX_FILE:
            raise ComposeError(f"{path} is larger than 1 MB")
        tree = _decoded(path.read_text())
        if _size_of(tree, {}) > MAX_NODES:
            raise ComposeError(f"{path} has more than {MAX_NODES} values once its aliases are written out")
    except RecursionError:
        raise ComposeError(f"{path} is nested too deeply") from None
    except OSError as error:
        raise ComposeError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeError, yaml.YAMLError) as error:
        raise ComposeError(f"{path} cannot be read: {error}") from None
    return tree


def _decoded(text: str) -> Any:
    """What YAML's safe loader makes of it, and Tagged for the specification's own tags."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def tagged(loader: Loader, suffix: str, node: yaml.Node) -> Tagged:
        if suffix not in ("reset", "override"):
            raise yaml.constructor.ConstructorError(None, None, f"there is no tag !{suffix}", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            value: Any = loader.construct_mapping(node, deep=True)
        elif isinstance(node, yaml.SequenceNode):
            value = loader.construct_sequence(node, deep=True)
        else:
            assert isinstance(node, yaml.ScalarNode)
            value = node.value if node.style else yaml.safe_load(node.value)
        return Tagged(value, reset=suffix == "reset")

    yaml.add_multi_constructor("!", tagged, Loader)
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _size_of(tree: Any, known: dict[int, int]) -> int:
    """Values in ``tree`` with aliases written out: each is the same object as its anchor. Raises RecursionError for a
    value that contains itself."""
    if isinstance(tree, Tagged):
        return _size_of(tree.value, known)
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        parts = tree.values() if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_size_of(part, known) for part in parts)
    return known[id(tree)]


def _assign_groups(tree: Mapping[str, Any], readers: Sequence[Reader]) -> None:
    """A file that keeps some of its services apart by networks makes each network a group of guests. In all others no
    service has a group: each reaches the others, and those of other stacks."""
    networks = {reader.key: reader.networks() for reader in readers}
    known = tree.get("networks") or {}
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
    return env_file(path) if path.is_file() else {}


def _volume(stack: str, key: str, value: Any) -> Volume:
    value = value or {}
    where = f"volumes.{key}"
    external = value.get("external") or False
    if external:
        given = external.get("name") if isinstance(external, dict) else value.get("name")
        return Volume(key, str(given or key), 0, external=True)
    if value.get("driver", "local") != "local":
        raise ComposeError(f"{where}.driver: volumes are disks of this host")
    size = value.get("x-size")
    gigabytes = DEFAULT_VOLUME_GB if size is None else max(1, -(-parse_size(str(size)) // (1 << 30)))
    return Volume(key, str(value.get("name") or f"{stack}-{key}"), gigabytes)


def _check_keys(tree: Any, where: str) -> None:
    """Raises ComposeError for a key that is no text, as in ``services: {1: …}``."""
    if isinstance(tree, Tagged):
        tree = tree.value
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in parts:
        if isinstance(tree, dict) and not isinstance(key, str):
            raise ComposeError(f"{where}{key}: a key must be a text; put it into quotes")
        _check_keys(value, f"{where}{key}.")
