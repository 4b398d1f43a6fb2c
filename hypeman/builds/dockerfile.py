"""Which images a Dockerfile starts from, as far as its text says. Pure.

BuildKit reads the Dockerfile itself; this only finds images of this host that it may use, so what is not recognised
here is fetched from its registry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hypeman.errors import InvalidRequest
from hypeman.images.reference import Reference, parse_reference
from hypeman.logins import DEFAULT_REGISTRY

MAX_BYTES = 1 << 20
MAX_IMAGES = 20
_ARG = re.compile(r"ARG\s+(?P<name>[A-Za-z_]\w*)(?:=(?P<value>\S*))?", re.IGNORECASE)
_FROM = re.compile(r"FROM\s+(?:--platform=\S+\s+)?(?P<image>\S+)(?:\s+AS\s+(?P<stage>\S+))?", re.IGNORECASE)
_COPY = re.compile(r"COPY\s+(?:--\S+\s+)*?--from=(?P<image>\S+)\s", re.IGNORECASE)
_DIRECTIVE = re.compile(r"\s*#\s*(?P<name>[A-Za-z]\w*)\s*=\s*(?P<value>\S+)\s*")
_VARIABLE = re.compile(r"\$(?:(?P<plain>[A-Za-z_]\w*)|{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?})")


def find_images(text: str, build_args: Mapping[str, str]) -> list[Reference]:
    """References of ``FROM`` and ``COPY --from``, without stages and digests."""
    values: dict[str, str] = {}
    stages: set[str] = set()
    found: dict[str, Reference] = {}
    for line in _instructions(text):
        if (match := _FROM.match(line)) is not None:
            image = _expand(match["image"], values)
            if image.lower() not in stages:
                _add(image, found)
            stages.add((match["stage"] or "").lower())
        elif (match := _COPY.match(line)) is not None:
            if match["image"].lower() not in stages:
                _add(match["image"], found)
        elif (match := _ARG.match(line)) is not None and not stages:
            values[match["name"]] = build_args.get(match["name"], (match["value"] or "").strip("\"'"))
    return list(found.values())[:MAX_IMAGES]


def find_syntax(text: str) -> list[str]:
    """The image of another frontend that the first comments name, if any."""
    for line in text.removeprefix("\ufeff").splitlines():
        if (directive := _DIRECTIVE.fullmatch(line)) is None:
            break
        if directive["name"].lower() == "syntax":
            return [directive["value"]]
    return []


def familiar_name(image: Reference) -> str:
    """As BuildKit looks for a named context: without what Docker adds to a short name."""
    registry = "" if image.registry == DEFAULT_REGISTRY else f"{image.registry}/"
    repository = image.repository if registry else image.repository.removeprefix("library/")
    return registry + repository + ("" if image.tag == "latest" else f":{image.tag}")


def _instructions(text: str) -> Iterator[str]:
    """Lines with their continuations, without comments."""
    pending = ""
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if stripped.endswith("\\"):
            pending += stripped[:-1] + " "
            continue
        yield pending + stripped
        pending = ""
    if pending:
        yield pending


def _add(image: str, found: dict[str, Reference]) -> None:
    if image.lower() == "scratch" or image.isdigit():
        return
    try:
        parsed = parse_reference(image)
    except InvalidRequest:
        return
    if not parsed.digest:
        found[str(parsed)] = parsed


def _expand(text: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return values.get(match["plain"] or match["name"]) or match["default"] or ""

    return _VARIABLE.sub(value, text)
