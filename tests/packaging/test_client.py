"""The command line as a wheel of its own: nothing of the server in it, and nothing of the server needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Running

ROOT = Path(__file__).parents[2]
REQUIRED = ("click", "msgspec", "wsproto", "h11", "yaml")
# Windows has none of these.
ABSENT = ("termios", "tty", "fcntl", "pwd", "grp", "resource", "pty")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the unpacked wheel and the packages that it requires, and no others."""
    made, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("client")
    subprocess.run([sys.executable, ROOT / "packaging" / "client" / "build", made], check=True, timeout=120)
    [wheel] = made.glob("hypeman_client-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        [metadata] = (name for name in archive.namelist() if name.endswith("METADATA"))
        required = archive.read(metadata).decode()
    assert required.count("Requires-Dist") == len(REQUIRED) - 1, "h11 comes with wsproto"
    for name in REQUIRED:
        found = __import__(name).__file__
        assert found is not None
        shutil.copytree(Path(found).parent, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path) as running:
        yield running


def run(client: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """``-I -S``: neither this checkout nor the packages of this environment are importable."""
    program = (
        f"import sys; sys.path.insert(0, {str(client)!r}); {before}\n"
        f"sys.argv = ['hypeman', *{list(arguments)!r}]\n"
        "from hypeman.__main__ import main; main()"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    environment = {"HOME": str(client), "PATH": os.environ["PATH"]}
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def test_it_talks_to_a_server(client: Path, server: Running) -> None:
    server.world.instances.add("web")
    listed = run(client, "--base-url", server.url, "ps", "--all")
    assert (listed.returncode, "web" in listed.stdout) == (0, True), listed.stderr
    result = run(client, "--base-url", server.url, "exec", "-T", "web", "--", "echo", "hello")
    assert (result.stdout, result.returncode) == ("hello\n", 0), result.stderr


def test_it_has_no_commands_that_need_the_server_program(client: Path) -> None:
    commands = run(client, "--help").stdout
    assert "  run " in commands
    for name in ("serve", "doctor", "token", "backup", "clean-host"):
        assert f"  {name} " not in commands
        assert run(client, name).returncode == 2


def test_it_runs_where_posix_modules_are_missing(client: Path, server: Running) -> None:
    server.world.instances.add("web")
    windows = f"import os, shutil, signal, socket; os.name = 'nt'; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    windows += "; del signal.SIGWINCH"
    base = ("--base-url", server.tcp_url)
    refused = run(client, *base, "ps", before=windows)
    assert (refused.returncode, "401" in refused.stderr) == (1, True), refused.stderr
    unix = run(client, "--base-url", server.url, "ps", before=f"{windows}; del socket.AF_UNIX")
    assert (unix.returncode, "no unix sockets" in unix.stderr) == (1, True), unix.stderr
    token = f"{windows}; os.environ['HYPEMAN_API_KEY'] = {server.token!r}"
    result = run(client, *base, "exec", "-i", "web", "--", "echo", "hello", before=token)
    assert (result.stdout, result.returncode) == ("hello\n", 0), result.stderr
    tty = run(client, *base, "exec", "-t", "web", before=token)
    assert (tty.returncode, "not supported on this system" in tty.stderr) == (2, True), tty.stderr
