"""``exec`` as a process: with pipes, and through a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def web(server: Any) -> None:
    server.world.instances.add("web")


def test_output_and_exit_code(shell: Any, server: Any) -> None:
    result = shell("exec", "-e", "A=b", "--cwd", "/tmp", "--timeout", "5", "web", "--", "echo", "-n", "hello")
    assert (result.stdout, result.stderr, result.returncode) == (b"-n hello\n", b"", 0)
    asked = server.world.instances.sessions[0].request
    assert (asked.env, asked.cwd, asked.timeout, asked.tty) == ({"A": "b"}, "/tmp", 5, False)
    assert shell("exec", "web", "false").returncode == 1
    missing = shell("exec", "web", "no-such-program")
    assert (missing.returncode, b"not found" in missing.stdout) == (127, True)


def test_much_output(shell: Any) -> None:
    assert shell("exec", "web", "big", "5000000").stdout == b"x" * 5_000_000


def test_standard_input_and_its_end(shell: Any) -> None:
    data = b"line\n" * 300_000
    result = shell("exec", "-i", "web", "cat", input=data)
    assert (result.stdout, result.returncode) == (data.upper(), 0)


def test_refusals(shell: Any) -> None:
    missing = shell("exec", "missing", "ls")
    assert (missing.returncode, b"404 not_found" in missing.stderr) == (1, True)


def test_a_lost_connection_is_255(server: Any) -> None:
    command = [sys.executable, "-m", "hypeman", "--base-url", server.url, "exec", "-i", "web", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"X"
        server.do(server.cut)
        output, errors = process.communicate(timeout=15)
    assert (process.returncode, b"ended before" in errors) == (255, True), (output, errors)


def test_interrupted_is_130(server: Any) -> None:
    command = [sys.executable, "-m", "hypeman", "--base-url", server.url, "exec", "-i", "web", "cat"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"X"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
    assert (process.returncode, errors) == (130, b"")
    wait_until(lambda: server.world.instances.sessions[0].closed)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Terminal:
    """A shell command on a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.seen = b""

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def wait_for(self, text: bytes, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    assert text in self.seen, self.seen

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(server: Any) -> Iterator[Terminal]:
    opened = Terminal(sys.executable, "-m", "hypeman", "--base-url", server.url, "exec", "-it", "web", "sh")
    yield opened
    os.close(opened.fd)


def test_a_terminal(terminal: Terminal, server: Any) -> None:
    terminal.type(b"hello")
    terminal.wait_for(b"HELLO")
    asked = server.world.instances.sessions[0].request
    assert (asked.tty, asked.command) == (True, ("sh",))
    assert not termios.tcgetattr(terminal.fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    terminal.type(b"\x03")  # Ctrl-C is the program's to see
    terminal.wait_for(b"\x03")
    terminal.resize(33, 111)
    terminal.wait_for(b"33x111")
    terminal.type(b"exit 7")
    assert terminal.exit_code() == 7
    assert termios.tcgetattr(terminal.fd)[3] & termios.ICANON  # as it was before


def test_no_terminal_where_none_is_wanted(shell: Any, server: Any) -> None:
    opened = Terminal(sys.executable, "-m", "hypeman", "--base-url", server.url, "exec", "-T", "web", "echo", "hi")
    opened.wait_for(b"hi")
    assert opened.exit_code() == 0
    os.close(opened.fd)
    assert not server.world.instances.sessions[0].request.tty
