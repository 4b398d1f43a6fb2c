"""The locked requirements: complete, hashed, and free of any index's address."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = {name: ROOT / "packaging" / "requirements" / f"{name}.txt" for name in ("build", "dev")}


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", path.read_text(), re.MULTILINE))


def normalized(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_a_pin_with_hashes(name: str) -> None:
    logical = LOCKS[name].read_text().replace("\\\n", " ").splitlines()
    wrong = [
        line for line in logical if line.strip() and not re.match(r"\s*#|[a-z0-9.-]+==\S+( +--hash=sha256:\S+)+", line)
    ]
    assert not wrong


@pytest.mark.parametrize("name", LOCKS)
def test_no_address_of_an_index(name: str) -> None:
    assert not re.findall(
        r"https?://|file://|--(?:extra-)?index-url|--find-links|--trusted-host", LOCKS[name].read_text()
    )


def test_what_is_built_is_what_is_tested() -> None:
    dev = pins(LOCKS["dev"])
    assert {name: dev.get(name) for name in pins(LOCKS["build"])} == pins(LOCKS["build"])


def test_pyproject_asks_for_nothing_that_is_not_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, wanted in (
        ("build", project["dependencies"] + extras["build"]),
        ("dev", project["dependencies"] + extras["build"] + extras["dev"]),
    ):
        assert {normalized(requirement) for requirement in wanted} <= set(pins(LOCKS[name])), name
