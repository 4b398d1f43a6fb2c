"""A compose file's directories on a real guest: copied before the program starts, and carried in as they change."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.real.appliance import IMAGE, ROOT, Appliance
from tests.real.kind import PATIENCE

pytestmark = [pytest.mark.real, pytest.mark.slow]

FILE = f"""
name: s
services:
  web:
    image: {IMAGE}
    command: sh -c "cat /conf/greeting; id -u; touch /conf/x || echo read-only; sleep 100000"
    mem_limit: 256m
    volumes: ["./conf:/conf:ro", "./own.conf:/etc/own.conf:ro", "./own.conf:/etc/hosts:ro", "./state:/var/state"]
    configs: [{{source: greeting, target: /etc/deep/greeting, mode: 0400}}, by-default]
    develop: {{watch: [{{action: sync, path: src, target: /srv/new/src}}]}}
configs: {{greeting: {{content: "hello, $$5"}}, by-default: {{file: ./own.conf}}}}
"""


async def test_directories_of_a_service(appliance: Appliance, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "greeting").write_text("hello from here\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "own.conf").write_text("of this host")
    (tmp_path / "state").write_text("begun")
    (tmp_path / "compose.yaml").write_text(FILE)
    stack = ("compose", "-f", str(tmp_path / "compose.yaml"))
    code, output = await appliance.cli(*stack, "up")
    assert code == 0, output + (await appliance.cli("logs", "--source", "vmm", "s-web"))[1] + appliance.log_tail(200)
    with trio.fail_after(PATIENCE):
        while "hello from here\n0\n" not in (printed := (await appliance.cli("logs", "s-web"))[1]):
            await trio.sleep(0.2)
        while "read-only" not in printed:
            printed = (await appliance.cli("logs", "s-web"))[1]
    files = "cat /etc/own.conf /etc/deep/greeting /by-default /etc/hosts; stat -c %a /etc/deep/greeting"
    files += "; echo on >> /var/state"
    assert await appliance.exec("s-web", "sh", "-c", files) == (0, "of this hosthello, $5of this hostof this host400\n")
    code, output = await appliance.cli("volume", "detach", "--instance", "s-web", "s-web-var-state")
    assert (code, "stop the instance first" in output) == (1, True)
    assert (await appliance.cli("restart", "s-web"))[0] == 0
    assert await appliance.exec("s-web", "cat", "/var/state", "/etc/own.conf") == (0, "begunon\nof this host")
    argv = [sys.executable, "-m", "hypeman", "--base-url", f"unix://{appliance.socket}", *stack, "watch", "--no-up"]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stderr is not None
        try:
            reported = await trio.to_thread.run_sync(_line_with, watching, "watch    ")
            assert str(tmp_path / "src") in reported
            (tmp_path / "src" / "sub").mkdir()
            (tmp_path / "src" / "sub" / "new").write_text("carried in")
            await _until(appliance, (0, "carried in"))
            (tmp_path / "src" / "sub" / "new").unlink()
            await _until(appliance, (1, ""))
        finally:
            watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE) == 130
    assert (await appliance.cli(*stack, "down", "--volumes"))[0] == 0
    assert (await appliance.get("/volumes"), await appliance.get("/instances")) == ([], [])


def _line_with(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    return next((line for line in process.stderr if text in line), "")


async def _until(appliance: Appliance, wanted: tuple[int, str]) -> None:
    """Until the guest has the file with this content, or none."""
    with trio.fail_after(PATIENCE):
        while (await appliance.exec("s-web", "sh", "-c", "cat /srv/new/src/sub/new 2>/dev/null")) != wanted:
            await trio.sleep(0.2)
