"""``exec`` over the end of its server: the command line as a process, a real server, and the real agent behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from hypeman.guest.client import GuestClient
from hypeman.guest.programs import ExecSession
from hypeman.guest.session_types import ExecRequest
from hypeman.guest.sessions import open_exec
from hypeman.instances.model.types import InstanceState
from tests.cli.conftest import Running
from tests.cli.test_exec import Terminal, wait_until
from tests.guest.conftest import NONCE, Agent, serve


class Upgraded(Running):
    """A server whose instance ``web`` is the agent; another one can follow it at the same address."""

    def __init__(self, directory: Path, agent: Agent) -> None:
        super().__init__(directory)
        self.agent = agent
        self.world.instances.add("web")

    async def _run(self) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self.agent.socket.dup()))
        client = GuestClient(stream, nonce=NONCE)

        async def execute(ref: str, request: ExecRequest) -> ExecSession:
            return await open_exec(client, request)

        self.world.instances.exec = execute  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, client)
            await super()._run()
            nursery.cancel_scope.cancel()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    (tmp_path / "root").mkdir()
    started = Agent(tmp_path / "root")
    yield started
    started.close()


def execute(server: Running, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hypeman", "--base-url", server.url, "exec", *arguments]
    return subprocess.Popen(
        command, bufsize=0, stdin=-1, stdout=-1, stderr=-1
    )  # all pipes; `communicate` knows of no buffers


def test_output_is_whole_over_two_upgrades(tmp_path: Path, agent: Agent) -> None:
    program = "i=0; while [ $i -lt 60 ]; do seq $((i * 500)) $((i * 500 + 499)); i=$((i+1)); sleep 0.1; done; exit 5"
    with Upgraded(tmp_path, agent) as first:
        running = execute(first, "web", "--", "sh", "-c", program)
        assert running.stdout is not None
        begin = running.stdout.read(1000)
    with Upgraded(tmp_path, agent) as second:
        while len(begin) < 50_000:
            begin += running.stdout.read(10_000)
        second.do(second.cut)
        begin += running.stdout.read(1)
    with Upgraded(tmp_path, agent):
        output, errors = running.communicate(timeout=60)
    assert begin + output == b"".join(b"%d\n" % i for i in range(30_000))
    assert (running.returncode, errors) == (5, b"")


def test_input_is_whole_over_an_upgrade(tmp_path: Path, agent: Agent) -> None:
    """Some of it was read by the program, some waits in the guest, some in the server and some in the command."""
    data = os.urandom(3_000_000)
    target, go = tmp_path / "root" / "all", tmp_path / "root" / "go"
    program = f"dd bs=1 count=1000 of={target}; while [ ! -e {go} ]; do sleep 0.1; done; cat >> {target}"
    with Upgraded(tmp_path, agent) as first:
        running = execute(first, "-i", "web", "--", "sh", "-c", program)
        assert running.stdin is not None
        # may be more than there is room for until the program reads on
        writer = threading.Thread(target=running.stdin.write, args=(data[:900_000],))
        writer.start()
        wait_until(lambda: target.exists() and target.stat().st_size == 1000)
    with Upgraded(tmp_path, agent):
        go.touch()
        writer.join(60)
        running.communicate(data[900_000:], timeout=60)
    assert running.returncode == 0
    assert target.read_bytes() == data


@pytest.mark.parametrize("program", ["cat", "exec <&-; cat $0"])
def test_input_that_the_program_does_not_read_yet_stops_no_output(tmp_path: Path, agent: Agent, program: str) -> None:
    """A program that writes as much as it reads, and one that has closed its input."""
    data = os.urandom(3_000_000)
    (tmp_path / "root" / "file").write_bytes(data)
    with Upgraded(tmp_path, agent) as server:
        running = execute(server, "-i", "web", "--", "sh", "-c", program, str(tmp_path / "root" / "file"))
        try:
            output, _ = running.communicate(data, timeout=60)
        finally:
            running.kill()
    assert running.returncode == 0
    assert output == data


def test_a_resumed_terminal_has_its_current_size(tmp_path: Path, agent: Agent) -> None:
    with Upgraded(tmp_path, agent) as first:
        opened = Terminal(sys.executable, "-m", "hypeman", "--base-url", first.url, "exec", "-it", "web", "sh")
        opened.type(b"A=kept; echo re${A}y\n")
        opened.wait_for(b"rekepty")
    opened.resize(44, 101)
    with Upgraded(tmp_path, agent):
        opened.type(b"stty size; echo still $A\n")
        opened.wait_for(b"still kept")
        opened.wait_for(b"44 101")
        opened.type(b"exit 4\n")
        assert opened.exit_code() == 4
    os.close(opened.fd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_ends_its_program(tmp_path: Path, agent: Agent, number: int) -> None:
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
    with Upgraded(tmp_path, agent) as server:
        running = execute(server, "web", "--", "sh", "-c", "echo here; exec sleep 1000")
        assert running.stdout is not None
        assert running.stdout.readline() == b"here\n"
        running.send_signal(number)
        assert running.wait(15) == 130
        wait_until(lambda: not children.read_text())
    running.communicate()


def test_a_program_that_is_gone_is_an_immediate_error(tmp_path: Path, agent: Agent) -> None:
    with Upgraded(tmp_path, agent) as first:
        running = execute(first, "web", "--", "sh", "-c", "echo here; exec sleep 1000")
        assert running.stdout is not None
        assert running.stdout.readline() == b"here\n"
    other = Agent(tmp_path / "root")
    with Upgraded(tmp_path, other):
        _, errors = running.communicate(timeout=30)
    other.close()
    assert (running.returncode, b"cannot be resumed: the program is no longer kept" in errors) == (255, True), errors


# The program of an idle instance


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Agent]:
    (tmp_path / "root").mkdir()
    (tmp_path / "log").touch()
    started = Agent(tmp_path / "root", "--idle", str(tmp_path / "log"))
    yield started
    started.close()


def opened(server: Running, *arguments: str) -> Terminal:
    return Terminal(sys.executable, "-m", "hypeman", "--base-url", server.url, *arguments)


def test_a_program_that_is_left_and_attached_again(tmp_path: Path, idle: Agent) -> None:
    """Ctrl-P Ctrl-Q, together or one by one, and Ctrl-P before anything else is the program's."""
    with Upgraded(tmp_path, idle) as server:
        first = opened(server, "run", "-it", "--name", "web2", "nginx", "sh")
        first.type(b"stty -echo; A=kept; echo re${A}y\n")
        first.wait_for(b"rekepty")
        first.type(b"\x10")
        time.sleep(0.2)
        first.type(b"\x11")
        first.wait_for(b"web2 continues: hypeman attach web2")
        assert first.exit_code() == 0
        assert [instance.state for instance in server.world.instances.instances.values()] == [InstanceState.RUNNING] * 2
        second = opened(server, "attach", "web")
        second.type(b"echo re${A}y\n")
        second.wait_for(b"rekepty")
        second.type(b"cat -v\n\x10x\n\x10")
        second.wait_for(b"^Px")
        second.type(b"\x11")
        second.wait_for(b"web continues")
        assert second.exit_code() == 0
        third = opened(server, "attach", "web")
        wait_until(lambda: not termios.tcgetattr(third.fd)[3] & termios.ICANON)
        third.type(b"\x03")
        third.wait_for(b"# ")
        third.type(b"stty size; echo still $A; exit 4\n")
        third.wait_for(b"still kept")
        assert third.exit_code() == 4
        for terminal in (first, second, third):
            os.close(terminal.fd)


def attached(server: Running, line: bytes) -> subprocess.Popen[bytes]:
    """A client without a terminal, which has had its line answered by the program."""
    command = [sys.executable, "-m", "hypeman", "--base-url", server.url, "attach", "web"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(line + b"\n")
    client.stdin.flush()
    assert client.stdout.readline() == b"got " + line + b"\n"
    return client


def test_ctrl_c_leaves_an_attached_program(tmp_path: Path, idle: Agent) -> None:
    """As it says: without a terminal there are no other keys for it."""
    command = "echo here; while read word; do echo got $word; done; sleep 1000"
    with Upgraded(tmp_path, idle) as server:
        arguments = ["--base-url", server.url, "run", "-i", "--name", "web2", "nginx", "sh", "-c", command]
        begun = subprocess.Popen([sys.executable, "-m", "hypeman", *arguments], stdin=-1, stdout=-1)
        assert begun.stdout is not None and begun.stdout.readline() == b"here\n"
        begun.kill()
        begun.communicate()
        client = attached(server, b"one")
        client.send_signal(signal.SIGINT)
        _, errors = client.communicate(timeout=30)
        assert (client.returncode, errors.strip()) == (0, b"web continues")
    with Upgraded(tmp_path, idle) as server:  # the first one has ended what its clients wanted to end
        assert Path(f"/proc/{idle.process.pid}/task/{idle.process.pid}/children").read_text()
        client = attached(server, b"two")
        client.kill()
        client.communicate()


def test_who_has_no_program_of_run_is_followed(tmp_path: Path, agent: Agent) -> None:
    with Upgraded(tmp_path, agent) as server:
        log = server.world.instances.log_directory / "web-app.log"
        log.touch()
        following = opened(server, "attach", "web")
        wait_until(lambda: appended(log, "a line\n", following))
        following.type(b"typed\x10\x11")
        following.wait_for(b"web continues")
        assert following.exit_code() == 0
        os.close(following.fd)


def appended(log: Path, text: str, terminal: Terminal) -> bool:
    """Whether the terminal has shown what is appended to the log."""
    with open(log, "a") as file:
        file.write(text)
    with suppress(AssertionError):
        terminal.wait_for(text.strip().encode(), 1)
    return text.strip().encode() in terminal.seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_ends_its_instance(tmp_path: Path, idle: Agent, number: int) -> None:
    with Upgraded(tmp_path, idle) as server:
        command = [sys.executable, "-m", "hypeman", "--base-url", server.url, "run", "-i", "--rm", "--name", "one"]
        with subprocess.Popen(
            [*command, "nginx", "sh", "-c", "echo here; exec sleep 1000"], stdin=-1, stdout=-1
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == b"here\n"
            running.send_signal(number)
            assert running.wait(15) == 130
        assert [instance.name for instance in server.world.instances.instances.values()] == ["web"]
        [request] = [asked for what, asked in server.world.instances.asked if what == "create"]
        assert (request.idle, request.auto_remove, request.ttl) == (True, True, "10m")
        assert [asked.ttl for what, asked in server.world.instances.asked if what == "update"] == ["0s"]


def test_a_ttl_that_was_given_stays(tmp_path: Path, idle: Agent) -> None:
    with Upgraded(tmp_path, idle) as server:
        command = [sys.executable, "-m", "hypeman", "--base-url", server.url, "run", "-i", "--rm", "--ttl", "10m"]
        done = subprocess.run([*command, "nginx", "true"], stdin=subprocess.DEVNULL, timeout=60, check=False)
        assert done.returncode == 0
        [request] = [asked for what, asked in server.world.instances.asked if what == "create"]
        assert request.ttl == "10m"
        assert [asked for what, asked in server.world.instances.asked if what == "update"] == []
