"""The rig's side of its protocol, with an agent that is late: no virtual host is started."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.metal.rig import MetalHost, RigError


def test_a_late_answer_is_not_that_of_the_next_request(tmp_path: Path) -> None:
    """Also when it was cut in the middle."""
    host = MetalHost([], tmp_path)
    ours, agent = socket.socketpair()
    host._agent, host._process = ours, subprocess.Popen(["sleep", "600"])
    try:
        agent.sendall(b"DONE 0 6\nsec")
        with pytest.raises(RigError, match="did not come in time"):
            host.run("first", timeout=0.1)
        agent.sendall(b"ond" + b"DONE 3 5\nright")
        assert host.run("second", timeout=60) == (3, "right")
    finally:
        host.close()
        agent.close()
