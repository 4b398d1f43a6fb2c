"""exec, driven through the host's client against the real agent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from hypeman.guest.client import GuestClient
from hypeman.guest.programs import ExecResult
from hypeman.guest.protocol import MAX_SESSIONS, WINDOW, Op
from hypeman.guest.types import ExecRequest

from .conftest import Agent


async def run(
    client: GuestClient, *argv: str, stdin: bytes = b"", **options: object
) -> tuple[ExecResult, bytes, bytes]:
    """Run to the end: result, standard output, standard error."""
    request = ExecRequest(argv=argv, **options)  # type: ignore[arg-type]
    output: tuple[list[bytes], list[bytes]] = ([], [])
    with trio.fail_after(20):
        async with await client.exec(request) as session:
            await session.send_stdin(stdin)
            await session.close_stdin()
            while not isinstance(got := await session.receive(), ExecResult):
                output[got.stderr].append(got.data)
            return got, b"".join(output[0]), b"".join(output[1])


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


async def test_output_streams_stay_apart_and_the_code_is_reported(client: GuestClient) -> None:
    result, out, err = await run(client, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.exit_code, out, err) == (7, b"out\n", b"err\n")


async def test_a_program_of_the_agent_ends_immediately_and_silently(client: GuestClient) -> None:
    """It takes what an exec takes, for guests in which nothing may run yet."""
    with trio.fail_after(20):
        reply, error, ended = await client.call(Op.WARM, None)
        assert (reply, error, ended.exit_code, ended.signal) == (b"", b"", 2, 0)
        await client.warm()


async def test_stdin_arrives_whole_with_its_end(client: GuestClient) -> None:
    data = os.urandom(3 * WINDOW + 12345)
    with trio.fail_after(20):
        async with await client.exec(ExecRequest(argv=("cat",))) as session, trio.open_nursery() as nursery:

            async def feed() -> None:
                await session.send_stdin(data)
                await session.close_stdin()

            nursery.start_soon(feed)
            back = b""
            while not isinstance(got := await session.receive(), ExecResult):
                back += got.data
    assert back == data
    assert got.exit_code == 0


async def test_environment_and_working_directory(client: GuestClient, tmp_path: Path) -> None:
    result, out, _ = await run(client, "sh", "-c", "echo $A $HOME; pwd", env=("A=1", "A2=x"), cwd=str(tmp_path))
    assert result.exit_code == 0
    assert out.decode() == f"1 /root\n{tmp_path}\n"


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("no-such-program",), 127, "executable file not found in $PATH"),
        (("/no/such/program",), 127, "No such file or directory"),
        (("/etc/passwd",), 126, "Permission denied"),
        (("/etc",), 126, "Permission denied"),
        (("",), 127, "not found"),
    ],
)
async def test_a_program_that_cannot_be_started_says_why(
    client: GuestClient, argv: tuple[str, ...], code: int, words: str
) -> None:
    result, _, _ = await run(client, *argv)
    assert result.exit_code == code
    assert words in result.message


async def test_a_script_without_interpreter_line_is_not_run_by_a_shell(client: GuestClient, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    result, _, _ = await run(client, str(script))
    assert (result.exit_code, "exec format error" in result.message) == (126, True)
    script.write_text("#!/no/interpreter\n")
    result, _, _ = await run(client, str(script))
    assert (result.exit_code, "interpreter" in result.message) == (127, True)


async def test_bad_users_and_directories_are_refused_by_name(client: GuestClient) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"user": "nobody-here"}, "unable to find user"),
        ({"user": "root:nix"}, "unable to find group"),
        ({"cwd": "/no/where"}, "/no/where"),
    )
    for options, words in cases:
        result, _, _ = await run(client, "true", **options)
        assert result.exit_code == 126
        assert words in result.message


async def test_users_by_name_and_number(client: GuestClient) -> None:
    for user, expected in [
        ("nobody", b"65534 65534"),
        ("nobody:daemon", b"65534 1"),
        ("4711", b"4711 0"),
        ("12:34", b"12 34"),
    ]:
        result, out, _ = await run(client, "sh", "-c", "echo $(id -u) $(id -g)", user=user)
        assert (result.exit_code, out.strip()) == (0, expected), user


async def test_killed_by_a_signal(client: GuestClient) -> None:
    result, _, _ = await run(client, "sh", "-c", "kill -9 $$")
    assert (result.exit_code, result.signal) == (137, 9)


async def test_timeout_kills_the_whole_session(client: GuestClient, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"set -m; sleep 1000 & echo $! > {pid_file}; sleep 1000"
    result, _, _ = await run(client, "sh", "-c", script, timeout_seconds=1, tty=True)
    assert (result.exit_code, result.timed_out) == (124, True)
    await wait_until(lambda: not is_alive(int(pid_file.read_text())))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


async def test_leaving_kills_the_whole_session(client: GuestClient, tmp_path: Path) -> None:
    """Also background jobs with process groups of their own, as a shell on a terminal makes them."""
    pid_file = tmp_path / "pid"
    script = f"set -m; sleep 1000 & echo $! > {pid_file}; echo begun; wait"
    output = b""
    async with await client.exec(ExecRequest(argv=("sh", "-c", script), tty=True)) as session:
        while b"begun" not in output:
            output += getattr(await session.receive(), "data", b"")
        pid = int(pid_file.read_text())
        assert os.getpgid(pid) == pid
    await wait_until(lambda: not is_alive(pid))


async def test_a_program_left_behind_does_not_hold_the_session(client: GuestClient) -> None:
    """A daemon that keeps the pipes open must not keep its starter's result from us."""
    result, out, _ = await run(client, "sh", "-c", "sleep 5 & echo started")
    assert (result.exit_code, out) == (0, b"started\n")


async def test_signals_reach_the_process_group(client: GuestClient) -> None:
    script = "trap 'echo got; exit 3' TERM; echo up; while :; do sleep 0.01; done"
    output = b""
    with trio.fail_after(10):
        async with await client.exec(ExecRequest(argv=("sh", "-c", script))) as session:
            await session.receive()
            await session.signal(15)
            while not isinstance(got := await session.receive(), ExecResult):
                output += b"" if got.stderr else got.data
    assert (got.exit_code, output) == (3, b"got\n")


async def test_terminal_size_resize_and_end_of_file(client: GuestClient) -> None:
    request = ExecRequest(
        argv=("sh", "-c", "stty size; test -t 0 && echo tty; read x; stty size; cat; echo end"),
        tty=True,
        rows=30,
        cols=100,
    )
    output = b""
    with trio.fail_after(10):
        async with await client.exec(request) as session:
            while b"tty" not in output:
                output += getattr(await session.receive(), "data", b"")
            await session.resize(50, 132)
            await session.send_stdin(b"x\n")
            await session.send_stdin(b"line\n")
            await session.close_stdin()
            while not isinstance(got := await session.receive(), ExecResult):
                output += got.data
    assert got.exit_code == 0
    assert b"30 100" in output
    assert b"50 132" in output
    assert output.rstrip().endswith(b"end")


async def test_control_c_on_a_terminal(client: GuestClient) -> None:
    """With cat, since dash loses an interrupt that comes while it starts a command."""
    output = b""
    with trio.fail_after(10):
        async with await client.exec(ExecRequest(argv=("cat",), tty=True)) as session:
            await session.send_stdin(b"x\n")
            while output.count(b"x") < 2:
                output += getattr(await session.receive(), "data", b"")
            await session.send_stdin(b"\x03")
            while not isinstance(got := await session.receive(), ExecResult):
                pass
    assert (got.exit_code, got.signal) == (130, 2)


async def test_output_is_not_lost_under_back_pressure(client: GuestClient) -> None:
    """The program ends long before we read; every byte still comes."""
    size = WINDOW + 65536
    async with await client.exec(ExecRequest(argv=("sh", "-c", f"head -c {size} /dev/zero"))) as session:
        await trio.sleep(0.3)
        total = 0
        with trio.fail_after(10):
            while not isinstance(got := await session.receive(), ExecResult):
                total += len(got.data)
                await trio.sleep(0.001)
    assert total == size


async def test_a_slow_session_holds_up_no_other(agent: Agent, client: GuestClient) -> None:
    async with (
        await client.exec(ExecRequest(argv=("yes",))),
        await client.exec(ExecRequest(argv=("sleep", "100"))) as deaf,
    ):
        with trio.move_on_after(1) as scope:
            await deaf.send_stdin(bytes(10 * WINDOW))
        assert scope.cancelled_caught, "a program that does not read must stop its sender"
        for _ in range(20):
            assert (await run(client, "true"))[0].exit_code == 0
        assert agent.memory < 4 * 1024 * 1024


async def test_many_at_once(client: GuestClient) -> None:
    codes: list[int] = []

    async def one(number: int) -> None:
        result, out, _ = await run(client, "sh", "-c", f"sleep 0.2; echo {number}; exit {number % 50}")
        assert out == b"%d\n" % number
        codes.append(result.exit_code)

    async with trio.open_nursery() as nursery:
        for number in range(MAX_SESSIONS + 22):
            nursery.start_soon(one, number)
    assert sorted(codes) == sorted(number % 50 for number in range(MAX_SESSIONS + 22))


async def test_thousands_of_execs_leak_nothing(agent: Agent, client: GuestClient) -> None:
    await run(client, "true")
    before = agent.descriptors
    for number in range(2000):
        async with await client.exec(ExecRequest(argv=("true",), tty=number % 5 == 0)) as session:
            if number % 7:  # some are left before they end
                while not isinstance(await session.receive(), ExecResult):
                    pass
    await wait_until(lambda: agent.descriptors == before)
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    assert not children
    assert agent.memory < 4 * 1024 * 1024


async def test_large_arguments_and_environment(client: GuestClient) -> None:
    """A request of several frames."""
    script = "echo ${#BIG} # " + "x" * 100_000
    result, out, _ = await run(client, "sh", "-c", script, env=("BIG=" + "y" * 60_000,))
    assert (result.exit_code, out) == (0, b"60000\n")


async def test_without_the_agent_nothing_is_served(tmp_path: Path) -> None:
    from .conftest import NONCE, serve

    agent = Agent(tmp_path, "--no-agent", "yes")
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(agent.socket.dup()))
    async with trio.open_nursery() as nursery:
        connected = GuestClient(stream, nonce=NONCE)
        await nursery.start(serve, connected)
        result, _, _ = await run(connected, "true")
        assert result.exit_code == 95
        assert "without the guest agent" in result.message
        assert connected.no_agent
        assert (await connected.metrics()).memory_total > 0
        nursery.cancel_scope.cancel()
    agent.close()
