"""Compose files of the specification's own loader, compose-go: what it makes of them, and what we do.

    python -m tests.cli.compose_conformance      writes the list below anew; then read its diff

The cases are the files and the documents in the tests of compose-go, which the Go proxy has; nothing of it is kept
here. The peer is compose-go itself (``compose_go/main.go``). Each case is one line of
``tests/golden/compose-conformance.txt``:

    same            both load it, and agree on every field that we support
    refused         neither loads it
    not supported   compose-go loads it, we refuse it, for the reason that follows
    accepted        we load what compose-go refuses

A case on which both load and disagree fails the test. Part of `make test-conformance`, which requires Go.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypeman.cli.compose import spec
from hypeman.cli.compose.model import ComposeError, Service, Stack
from hypeman.cli.compose.service import CONDITIONS
from tests.cli import compose_keys

MODULE = "github.com/compose-spec/compose-go/v2"
VERSION = "v2.16.2"
SUM = "h1:pTp1DqQwJzFd85GzlWsSszKA1ABrV/ySqsClujIcWA8="
"""Of the module's files, as in go.sum."""
GOLDEN = Path(__file__).parents[1] / "golden" / "compose-conformance.txt"
PROGRAM = Path(__file__).parent / "compose_go" / "main.go"
CACHE = Path(__file__).parents[2] / "build" / "compose-go"
_JOBS = re.compile(r"^jobs:\n(?:(?:[ \t].*)?\n)*", re.MULTILINE)
"""Of a later draft, and with the names of the services, which the documents repeat there."""
DIFFERENT = "DIFFERENT"
_DOCUMENT = re.compile(r"`([^`]*\bservices:[^`]*)`")
_SECONDS = 600


def test_what_becomes_of_the_cases() -> None:
    assert shutil.which("go"), "Go is missing"
    found = outcomes()
    assert [line for line in found if DIFFERENT in line] == []
    assert found == GOLDEN.read_text().splitlines()


def test_no_key_of_the_schema_is_dropped_silently(tmp_path: Path) -> None:
    schema = json.loads((_module() / "schema" / "compose-spec.json").read_text())
    assert len(list(compose_keys.keys_of(schema))) > 300
    assert compose_keys.dropped(schema, compose_keys.written(tmp_path)) == []


@pytest.mark.parametrize(
    ("ours", "message"),
    [({"image": "other"}, "image"), ({"environment": {"A": "2"}}, "env"), ({"depends_on": {}}, "depends_on")],
)
def test_a_difference_is_seen(tmp_path: Path, ours: dict[str, Any], message: str) -> None:
    """The comparison itself, without compose-go."""
    theirs = {
        "image": "x", "environment": {"A": "1"},
        "depends_on": {"db": {"condition": "service_started", "required": True}},
    }  # fmt: skip
    tree = {"services": {"web": {**theirs, **ours}, "db": {"image": "y"}}}
    stack = spec.parse(tree, tmp_path, {}, name="case")
    [found] = differences({"services": {"web": theirs, "db": {"image": "y"}}}, stack)
    assert message in found


def outcomes() -> list[str]:
    """One line for each case."""
    module = _module()
    with tempfile.TemporaryDirectory() as folder:
        cases = dict(_cases(module, Path(folder)))
        return [f"{name}: {_outcome(cases[name], reported, module)}" for name, reported in _ask(cases).items()]


def _module() -> Path:
    """The module's files, verified, and the program that asks it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (CACHE / "oracle").exists():
        shutil.copy(PROGRAM, CACHE)
        (CACHE / "go.mod").write_text(f"module oracle\n\ngo 1.24\n\nrequire {MODULE} {VERSION}\n")
        for command in (("mod", "tidy"), ("build", "-o", "oracle", ".")):
            subprocess.run(["go", *command], cwd=CACHE, check=True, timeout=_SECONDS)
    completed = subprocess.run(
        ["go", "mod", "download", "-json", f"{MODULE}@{VERSION}"],
        cwd=CACHE, check=True, capture_output=True, timeout=_SECONDS,
    )  # fmt: skip
    about = json.loads(completed.stdout)
    assert about["Sum"] == SUM
    return Path(about["Dir"])


def _cases(module: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each case. Documents in Go's tests are written to a folder of their own each."""
    for path in sorted([*module.glob("loader/testdata/**/*.yaml"), *module.glob("cli/testdata/**/*.yaml")]):
        yield str(path.relative_to(module)), path
    for path in sorted([*module.glob("loader/*_test.go"), *module.glob("loader/tests/*_test.go")]):
        for number, text in enumerate(_DOCUMENT.findall(path.read_text()), 1):
            name = f"{path.relative_to(module)} {number}"
            file = folder / name.replace("/", "-").replace(" ", "-") / "compose.yaml"
            file.parent.mkdir()
            file.write_text(_JOBS.sub("", text))
            if _is_yaml(text):
                yield name, file


def _is_yaml(text: str) -> bool:
    """Apart from tags of its own."""
    try:
        yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return False
    return True


def _ask(cases: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What compose-go makes of each."""
    asked = "".join(f"{path}\n" for path in cases.values())
    result = subprocess.run(
        [CACHE / "oracle"], input=asked, capture_output=True, text=True, check=True, timeout=_SECONDS, env={}
    )
    return dict(zip(cases, map(json.loads, result.stdout.splitlines()), strict=True))


def _outcome(path: Path, told: dict[str, Any], module: Path) -> str:
    try:
        stack = spec.parse(spec.read_yaml(path), path.parent, {}, name="case")
        stack.ordered()
    except ComposeError as error:
        reason = str(error).splitlines()[0].replace(str(path.parent), ".").replace(str(module), "…")
        return "refused" if "error" in told else f"not supported: {reason}"
    if "error" in told:
        return "accepted"
    found = differences(told["project"], stack)
    return f"{DIFFERENT}: {'; '.join(found)}" if found else "same"


def differences(project: Mapping[str, Any], stack: Stack) -> list[str]:
    """Where compose-go's project and our stack do not say the same."""
    theirs, ours = project.get("services") or {}, {service.key: service for service in stack.services}
    if theirs.keys() != ours.keys():
        return [f"services {sorted(theirs)} and {sorted(ours)}"]
    found = []
    for key, service in ours.items():
        wanted, have = _said(theirs[key]), _done(service, stack)
        found += [
            f"{key}.{field}: {wanted[field]!r}, ours {have[field]!r}"
            for field in wanted
            if wanted[field] != have[field]
        ]
    return found


def _said(service: Mapping[str, Any]) -> dict[str, Any]:
    build = service.get("build") or {}
    return {
        "image": service.get("image") or "",
        "cmd": service.get("command") or [],
        "entrypoint": service.get("entrypoint") or [],
        "env": {key: value for key, value in (service.get("environment") or {}).items() if value is not None},
        "user": service.get("user") or "",
        "working_dir": service.get("working_dir") or "",
        "platform": service.get("platform") or "",
        "depends_on": {key: one["condition"] for key, one in (service.get("depends_on") or {}).items()},
        "ports": sorted(
            (str(port.get("published") or 0), port["target"], port.get("protocol", "tcp"), port.get("host_ip", ""))
            for port in service.get("ports") or []
        ),
        "mounts": sorted(
            [
                (one["target"], bool(one.get("read_only")))
                for one in service.get("volumes") or []
                if one["type"] in ("volume", "bind") and one.get("source")
            ]
            + [(one.get("target") or f"/{one['source']}", True) for one in service.get("configs") or []]
        ),
        "build": {key: build[key] for key in ("context", "target") if build.get(key)},
        "args": {key: value or "" for key, value in (build.get("args") or {}).items()},
    }


def _mounts(service: Service, stack: Stack) -> Iterator[tuple[str, bool]]:
    volumes = {volume.name: volume for volume in stack.volumes}
    for mount in service.mounts:
        paths = (
            [f"/{file.path}" for file in volumes[mount["volume_id"]].files]
            if mount.get("files")
            else [mount["mount_path"]]
        )
        yield from ((path, bool(mount.get("readonly"))) for path in paths)


def _done(service: Service, stack: Stack) -> dict[str, Any]:
    body = service.body
    built = bool(service.build) and body["image"] == f"localhost/{service.name}:latest"
    conditions = {value: key for key, value in CONDITIONS.items()}
    return {
        "image": "" if built else body["image"],
        "cmd": body.get("cmd") or [],
        "entrypoint": body.get("entrypoint") or [],
        "env": body.get("env") or {},
        "user": body.get("user") or "",
        "working_dir": body.get("working_dir") or "",
        "platform": body.get("platform") or "",
        "depends_on": {key: conditions[value] for key, value in service.depends_on.items()},
        "ports": sorted(
            (
                str(port["host_port"] + n if port["host_port"] else 0),
                port["guest_port"] + n,
                port["protocol"],
                port.get("host_address", ""),
            )
            for port in body.get("ports") or []
            for n in range(port.get("count", 1))
        ),
        "mounts": sorted(_mounts(service, stack)),
        "build": {key: service.build[key] for key in ("context", "target") if service.build.get(key)},
        "args": service.build.get("build_args") or {},
    }


if __name__ == "__main__":
    lines = outcomes()
    GOLDEN.write_text("\n".join(lines) + "\n")
    print(Counter(line.split(": ")[1] for line in lines))
