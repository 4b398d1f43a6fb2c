"""A command must be there at once: what client commands import, and that the program runs at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


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
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.stdout.startswith(".TH")
    assert done.stderr == ""
