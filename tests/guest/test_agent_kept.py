"""Programs that outlive their connection: the host's client against the real agent, one connection after another."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypeman.errors import InvalidRequest, NotFound
from hypeman.guest.client import GuestClient
from hypeman.guest.programs import ExecResult, ExecSession, Output
from hypeman.guest.protocol import KEPT_BYTES, MAIN_KEY
from hypeman.guest.types import ExecRequest, Exited

from .conftest import NONCE, Agent, serve

COUNT = "i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done; echo that is all >&2; exit 3"
COUNTED = b"".join(b"line %d\n" % i for i in range(30000)) + b"that is all\n"


@asynccontextmanager
async def connected(agent: Agent) -> AsyncIterator[GuestClient]:
    """A host that comes, and goes without a word."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(agent.socket.dup()))
    client = GuestClient(stream, nonce=NONCE)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, client)
        with trio.fail_after(20):
            await client.wait_ready()
            yield client
        nursery.cancel_scope.cancel()


async def start(client: GuestClient, *argv: str) -> ExecSession:
    session = await client.exec(ExecRequest(argv=argv, keep=True))
    assert session.key
    return session


async def test_output_continues_where_the_client_was(agent: Agent) -> None:
    """Whatever the client had acknowledged, and wherever it was cut off."""
    rng = random.Random(3)
    key, had, result, visits = b"", b"", None, 0
    while result is None:
        async with connected(agent) as client:
            visits += 1
            session = await (client.resume(key, len(had)) if key else start(client, "sh", "-c", COUNT))
            key = session.key
            until = len(had) + rng.randrange(60_000)
            while len(had) < until and result is None:
                got = await session.receive()
                if isinstance(got, Output):
                    had += got.data
                    if rng.random() < 0.5:
                        session.acknowledge(rng.randrange(len(had) + 1))
                else:
                    result = got
            if rng.random() < 0.5:
                await session.aclose()
    assert (had, result.exit_code) == (COUNTED, 3)
    assert visits > 5


async def test_the_exit_code_waits_for_its_client(agent: Agent) -> None:
    async with connected(agent) as client:
        session = await start(client, "sh", "-c", "exit 9")
        assert isinstance(await session.receive(), ExecResult)
    async with connected(agent) as client:
        session = await client.resume(session.key, 0)
        result = await session.receive()
        assert isinstance(result, ExecResult) and result.exit_code == 9
        session.end()
        await session.aclose()
        with pytest.raises(NotFound, match="no longer kept"):
            await client.resume(session.key, 0)


async def test_input_continues_where_the_guest_was(agent: Agent, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(1_500_000)
    target = tmp_path / "root" / "all"
    key, sent = b"", 0
    while True:
        async with connected(agent) as client:
            session = await (client.resume(key, 0) if key else start(client, "sh", "-c", f"cat > {target}"))
            key = session.key
            if session.resumed is not None:
                assert session.resumed.received <= sent
                sent = session.resumed.received
            part = data[sent : sent + 400_000]
            if not part:
                await session.close_stdin()
                assert isinstance(await session.receive(), ExecResult)
                break
            with trio.move_on_after(0.05):  # then the connection is lost
                await session.send_stdin(part)
                await trio.sleep_forever()
            sent += len(part)
    assert target.read_bytes() == data


async def test_without_a_client_it_waits_and_takes_no_memory(agent: Agent) -> None:
    async with connected(agent) as client:
        session = await start(client, "sh", "-c", "yes | head -c 10000000")
        got = 0
        with trio.move_on_after(0.5):
            while isinstance(output := await session.receive(), Output):
                got += len(output.data)
        assert 0 < got <= KEPT_BYTES
        with pytest.raises(InvalidRequest, match="were sent"):
            session.acknowledge(got + 1)
    assert agent.memory < 2_000_000
    async with connected(agent) as client:
        for wrong in (got + KEPT_BYTES, 2**62):
            with pytest.raises(NotFound):
                await client.resume(session.key, wrong)
        session = await client.resume(session.key, 0)
        again = 0
        while again < got:
            output = await session.receive()
            assert isinstance(output, Output)
            again += len(output.data)
        session.end()
        await session.aclose()


async def test_many_small_pieces_of_both_streams_are_kept(agent: Agent) -> None:
    """Records take more than what they hold."""
    script = "i=0; while [ $i -lt 3000 ]; do echo -n o; echo -n e >&2; i=$((i+1)); done"
    had: dict[bool, bytes] = {False: b"", True: b""}
    async with connected(agent) as client:
        session = await start(client, "sh", "-c", script)
        await trio.sleep(0.2)
    async with connected(agent) as client:
        session = await client.resume(session.key, 0)
        while isinstance(output := await session.receive(), Output):
            had[output.stderr] += output.data
            session.acknowledge(len(had[False]) + len(had[True]))
    assert had == {False: b"o" * 3000, True: b"e" * 3000}


async def test_its_time_ends(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    agent = Agent(root, "--keep-ms", "50")
    try:
        async with connected(agent) as client:
            session = await start(client, "sleep", "1000")
        await trio.sleep(0.2)
        async with connected(agent) as client:
            with pytest.raises(NotFound):
                await client.resume(session.key, 0)
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
        with trio.fail_after(10):
            while children.read_text():
                await trio.sleep(0.01)
    finally:
        agent.close()


async def test_programs_without_a_client_take_no_slot_of_others(agent: Agent) -> None:
    """The longest abandoned one goes when there is no other slot; nothing of those with a client ends."""
    async with connected(agent) as client:
        first = await start(client, "sleep", "1000")
        await first.aclose()
        keys = []
        for _ in range(100):
            session = await start(client, "sleep", "1000")
            keys.append(session.key)
            await session.aclose()
        plain = await client.exec(ExecRequest(argv=("cat",)))
        for _ in range(60):
            await (await start(client, "sleep", "1000")).aclose()
        await plain.send_stdin(b"still here")
        output = await plain.receive()
        assert isinstance(output, Output) and output.data == b"still here"
        with pytest.raises(NotFound):
            await client.resume(first.key, 0)
        session = await client.resume(keys[-1], 0)
        session.end()
        await session.aclose()


# The program of an idle instance


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What would be the instance's log."""
    (tmp_path / "log").touch()
    return tmp_path / "log"


@pytest.fixture
def idle(tmp_path: Path, log: Path) -> Iterator[Agent]:
    """An agent that keeps programs for 100 ms."""
    (tmp_path / "root").mkdir()
    started = Agent(tmp_path / "root", "--idle", str(log), "--keep-ms", "100")
    yield started
    started.close()


async def start_main(client: GuestClient, script: str, *, tty: bool = False) -> ExecSession:
    session = await client.exec(ExecRequest(argv=("sh", "-c", script), main=True, tty=tty))
    assert session.key == MAIN_KEY
    return session


async def ended(client: GuestClient) -> Exited:
    with trio.fail_after(60):
        while not isinstance(event := await client.events.receive(), Exited):
            pass
    return event


async def over(agent: Agent) -> None:
    """The machine is off; while its host is there, so that nothing is waited for."""
    with trio.fail_after(60):
        while agent.process.poll() is None:
            await trio.sleep(0.05)


async def test_the_machine_ends_with_the_program_of_an_idle_instance(idle: Agent, log: Path) -> None:
    async with connected(idle) as client:
        session = await start_main(client, "echo out; echo err >&2; exit 7")
        had = b""
        while isinstance(output := await session.receive(), Output):
            had += output.data
        assert (sorted(had.split()), output.exit_code) == ([b"err", b"out"], 7)
        assert (await ended(client)).exit_code == 7
        session.end()
        await session.aclose()
        await over(idle)
    assert idle.process.returncode == 0
    assert sorted(log.read_text().split()) == ["err", "out"]


@pytest.mark.parametrize("tty", [False, True])
async def test_a_program_that_is_left_runs_on_and_takes_input_again(idle: Agent, log: Path, tty: bool) -> None:
    script = "echo begun; seq 40000; echo done > mark; read line; echo got $line; exit 3"
    script = script.replace("mark", str(log.with_name("mark")))
    async with connected(idle) as client:
        session = await start_main(client, script, tty=tty)
        assert isinstance(await session.receive(), Output)
        session.leave()
        await session.aclose()
        await client.stat("/")  # the guest has read that
    with trio.fail_after(60):
        while not log.with_name("mark").exists():  # it was never blocked, and never ended for want of a client
            await trio.sleep(0.05)
    await trio.sleep(0.5)
    async with connected(idle) as client:
        session = await client.resume(MAIN_KEY, None)
        assert session.resumed is not None and session.resumed.tty is tty
        begin = session.resumed.output
        assert begin is not None
        session.acknowledge(begin)
        await session.send_stdin(b"this\n")
        had = b""
        while isinstance(output := await session.receive(), Output):
            had += output.data
            session.acknowledge(begin + len(had))
        assert (b"got this" in had, b"begun" in had, output.exit_code) == (True, False, 3)
        assert (await ended(client)).exit_code == 3
        session.end()
        await session.aclose()
        await over(idle)
    lines = log.read_text().splitlines()
    assert [line for line in lines if line != "this"] == ["begun", *map(str, range(1, 40001)), "got this"]


async def test_a_program_whose_client_is_lost_ends_and_the_machine_with_it(idle: Agent) -> None:
    async with connected(idle) as client:
        await start_main(client, "sleep 1000")
        await client.stat("/")
    async with connected(idle) as client:
        assert (await ended(client)).exit_code == 137


async def test_a_program_that_ends_without_a_client_is_in_the_log(idle: Agent, log: Path) -> None:
    async with connected(idle) as client:
        session = await start_main(client, "sleep 0.3; seq 10000; exit 5")
        session.leave()
        await session.aclose()
        await client.stat("/")  # the guest has read that
        assert (await ended(client)).exit_code == 5
        await over(idle)
    assert log.read_text().splitlines() == list(map(str, range(1, 10001)))


async def test_an_instance_has_one_program(idle: Agent, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with_own = Agent(tmp_path / "other")
    try:
        async with connected(idle) as client:
            await start_main(client, "sleep 1000")
            await refuses_another(client)
        async with connected(with_own) as client:
            await refuses_another(client)
    finally:
        with_own.close()


async def refuses_another(client: GuestClient) -> None:
    result = await (await start_main(client, "true")).receive()
    assert isinstance(result, ExecResult)
    assert (result.exit_code, result.message) == (126, "this instance has a program of its own")


async def test_signals_are_for_the_program_of_an_idle_instance(idle: Agent) -> None:
    async with connected(idle) as client:
        session = await start_main(client, "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
        assert isinstance(await session.receive(), Output)
        await client.shutdown()
        assert (await ended(client)).exit_code == 9
