"""The web UI in Chromium: on a server of fakes, then with a real guest. `make test-ui` runs it.

Server and browser are in a network namespace of their own. Not part of `make test`: it requires a browser.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from hypeman.host.usage import read_usage
from hypeman.tokens import Scope, mint
from tests.real.appliance import Namespace, check_host, running_appliance, short_directory
from tests.real.kind import PATIENCE
from tests.ui.world import SECRET

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "ui"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def built() -> None:
    check_built()


def check_built() -> None:
    assert (BUILT / "dist" / "index.html").exists(), "the UI was not built: `make ui`"
    assert Path(CHROMIUM).exists(), "there is no Chromium: `apt-get install chromium`"


def run_browser(namespace: Namespace, script: str, base: str, *, patience: float = 60) -> str:
    """Runs the tests in a script of this folder; their output, which the failure has as well."""
    return run_node(namespace, script, base, "--test", "--test-reporter", "spec", patience=patience)


def run_node(namespace: Namespace, script: str, base: str, *options: str, patience: float = 60, **settings: str) -> str:
    """Runs a script of this folder; its output."""
    reading = [scope for scope in Scope if scope.endswith(":read")]
    tokens = {"all": mint(SECRET, subject="ann@example.com"), "read": mint(SECRET, subject="viewer", scopes=reading)}
    environment = {
        **os.environ,
        "BASE": base,
        "TOKENS": json.dumps(tokens),
        "CHROMIUM": CHROMIUM,
        "PATIENCE": str(round(patience)),
        **settings,
    }
    command = namespace.command("node", *options, str(ROOT / "tests" / "ui" / script))
    result = subprocess.run(command, cwd=BUILT, env=environment, capture_output=True, text=True, timeout=1800)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    return result.stdout


class Fakes(NamedTuple):
    base: str
    pid: int


@contextmanager
def fakes(namespace: Namespace, *arguments: str) -> Iterator[Fakes]:
    """The server of fakes: its address and process."""
    command = namespace.command(sys.executable, "-m", "tests.ui.world", *arguments)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield Fakes(f"http://localhost:{json.loads(process.stdout.readline())['port']}", process.pid)
        assert process.poll() is None, "the server of fakes has ended"
        print(f"the server of fakes used {read_usage(process.pid).cpu_seconds} s of CPU time")
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    try:
        yield made
    finally:
        made.remove()


def test_what_people_do_and_what_axe_finds(namespace: Namespace) -> None:
    with fakes(namespace, "--instances", "40") as server:
        run_browser(namespace, "flows.mjs", server.base)


def test_a_thousand_instances(namespace: Namespace) -> None:
    with fakes(namespace, "--instances", "1000", "--events", "50") as server:
        run_browser(namespace, "many.mjs", server.base)


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("ui")


async def test_a_real_guest(directory: Path) -> None:
    async with running_appliance(directory, PORT="8080", JWT_SECRET=SECRET) as appliance:
        run_browser(appliance.namespace, "guest.mjs", "http://localhost:8080", patience=PATIENCE)
