"""The rig of the virtual host, without a host: it waits for nothing that cannot come (tests/metal/rig.py)."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.metal import rig
from tests.metal.rig import MetalHost, RigError


@pytest.mark.parametrize(("seconds", "stuck"), [(22, False), (134, True)])
def test_a_host_that_stands_still_is_not_waited_for(
    seconds: int, stuck: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lockup of some seconds passes, and one from before the request is none of it."""
    monkeypatch.setattr(rig, "_LOOK_SECONDS", 0.01)
    console = tmp_path / "console"
    console.write_text("watchdog: BUG: soft lockup - CPU#1 stuck for 200s! [qemu-system-x86:1]\n")
    host = MetalHost([], tmp_path)
    host._agent, agent = socket.socketpair()

    def answer() -> None:
        agent.recv(100)
        with console.open("a") as file:
            file.write(f"watchdog: BUG: soft lockup - CPU#0 stuck for {seconds}s! [qemu-system-x86:1]\n")
        if not stuck:
            agent.sendall(b"DONE 0 3\nyes")

    with agent, host._agent:
        thread = threading.Thread(target=answer)
        thread.start()
        if stuck:
            with pytest.raises(RigError, match="stands still"):
                host.run("true", timeout=250)
        else:
            assert host.run("true", timeout=250) == (0, "yes")
        thread.join()


def test_a_host_that_goes_off_says_how(tmp_path: Path) -> None:
    """A QEMU that was killed and a host that shut down are distinguished."""
    (tmp_path / "qemu.log").write_text("")
    host = MetalHost([], tmp_path)
    host._agent, agent = socket.socketpair()
    host._process = subprocess.Popen(["sh", "-c", "kill -9 $$"])
    agent.close()
    with host._agent, pytest.raises(RigError, match=r"exit code -9"):
        host._line(time.monotonic() + 60)
