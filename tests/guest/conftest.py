"""The real agent on a socket pair, without a guest around it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from hypeman.guest.client import GuestClient
from hypeman.guest.initrd import INIT

TOP = Path(__file__).parents[2]
NONCE = bytes(range(16))


@pytest.fixture(scope="session", autouse=True)
def built_agent() -> Path:
    """The agent, freshly built: a stale binary would prove nothing."""
    subprocess.run(["make", "-s", "-C", TOP / "ext" / "guest_agent"], check=True)
    return INIT


class Agent:
    """A process that is nothing but the agent; ``root`` is where its requests see their files."""

    def __init__(self, root: Path, *options: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("the agent changes users: requires root")
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                str(INIT),
                "--agent-fd",
                str(theirs.fileno()),
                "--root",
                str(root),
                "--nonce",
                NONCE.hex(),
                *options,
            ]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={"PATH": os.environ["PATH"]})
        self.socket = ours
        self.root = root

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def memory(self) -> int:
        """Resident bytes."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """The agent ends by itself when its host goes away; anything else is a failure."""
        self.socket.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    root = tmp_path / "root"
    root.mkdir()
    started = Agent(root)
    yield started
    started.close()


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[GuestClient]:
    """A client that is connected and greeted."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(agent.socket.dup()))
    connected = GuestClient(stream, nonce=NONCE)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, connected)
        with trio.fail_after(10):
            await connected.wait_ready()
        yield connected
        nursery.cancel_scope.cancel()


async def serve(client: GuestClient, task_status: trio.TaskStatus[None]) -> None:
    try:
        await client.run(task_status=task_status)
    except Exception:  # its callers learn why from their own calls
        return
