"""A command must be there at once: what client commands import, and that the program runs at all."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import click
import pytest

import hypeman.cli as hypeman_cli
from hypeman.cli.main import hypeman
from hypeman.cli.tree import CLIENT, SERVER

SLOW = (
    *("trio", "quart", "hypercorn", "httpx", "lmdb", "pyroute2", "prometheus_client", "jwt", "yaml", "asyncio"),
    *("json", "tempfile", "hypeman.builds"),
)


@pytest.mark.parametrize("arguments", [["--help"], ["ps"], ["exec", "web", "ls"], ["cp", "web:/a", "/tmp/b"]])
def test_client_commands_load_no_server(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['hypeman', '--base-url', 'unix:///nowhere', *{arguments!r}]\n"
        "from hypeman.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        f"print([name for name in {SLOW!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_command_imports_its_own_module() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['hypeman', 'ps', '--help']\n"
        "from hypeman.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "mine = ('builds', 'compose', 'run', 'copy', 'host')\n"
        "print([name for name in mine if f'hypeman.cli.{name}' in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def below(command: click.Command) -> set[click.Command]:
    """The command and all commands below it."""
    if not isinstance(command, click.Group):
        return {command}
    return {command}.union(*(below(one) for one in command.commands.values()))


def test_every_command_that_is_written_can_be_called() -> None:
    """One that ``tree.py`` or a group does not name is dead code."""
    written = {
        f"{module.name}:{name}": found
        for module in pkgutil.walk_packages(hypeman_cli.__path__, f"{hypeman_cli.__name__}.")
        for name, found in vars(importlib.import_module(module.name)).items()
        if isinstance(found, click.Command)
    }
    reached = below(hypeman)
    assert not [place for place, command in written.items() if command not in reached]


@pytest.mark.parametrize("name", [*CLIENT, *SERVER])
def test_each_command_is_where_the_table_says(name: str) -> None:
    assert hypeman.commands[name].name == name


def test_version_and_no_such_command() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hypeman", *arguments], capture_output=True, text=True, timeout=30, env=os.environ
        )

    assert run("--version").stdout.startswith("hypeman, version ")
    unknown = run("fly")
    assert (unknown.returncode, "No such command 'fly'" in unknown.stderr) == (2, True)
    assert run("rm").returncode == 2


def test_a_reader_that_leaves_is_no_error_message() -> None:
    command = f"{sys.executable} -m hypeman man | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert result.stdout.startswith(".TH")
    assert result.stderr == ""
