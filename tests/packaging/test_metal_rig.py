"""The rig of the virtual host, without a host: it waits for nothing that cannot come (tests/metal/rig.py)."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.metal import rig
from tests.metal.rig import MetalHost, RigError


@pytest.mark.parametrize(("seconds", "stuck"), [(22, False), (134, True)])
def test_a_hung_host_is_not_waited_for(
    seconds: int, stuck: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lockup of some seconds passes, and one from before the request is none of it."""
    monkeypatch.setattr(rig, "_CHECK_SECONDS", 0.01)
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
            with pytest.raises(RigError, match="hangs"):
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


def test_a_host_that_is_waited_for_is_nudged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that the emulator lost is made up for: a host that sleeps goes on when a key is pressed."""
    monkeypatch.setattr(rig, "_CHECK_SECONDS", 0.01)
    host = MetalHost([], tmp_path)
    host._agent, agent = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as machine, agent, host._agent:
        machine.bind(str(tmp_path / "qmp"))
        machine.listen()

        def sleep_until_a_key() -> None:
            connection, _ = machine.accept()
            with connection, connection.makefile("rwb", buffering=0) as lines:
                lines.write(b'{"QMP": {}}\n')
                for request in lines:
                    lines.write(b'{"return": {}}\n')
                    if json.loads(request)["execute"] == "send-key":
                        agent.sendall(b"DONE 0 3\nyes")
                        break

        thread = threading.Thread(target=sleep_until_a_key)
        thread.start()
        assert host.run("true", timeout=60) == (0, "yes")
        thread.join()
