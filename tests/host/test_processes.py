"""Programs that outlive us, helper tools, and the names of processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.host.processes import (
    Process,
    Processes,
    Program,
    SpawnFailed,
    ToolFailed,
    groups_for,
    mark_argument,
    open_for_child,
)
from hypeman.host.temporary_access import encode_acl, temporary_access

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="requires root: changes users and namespaces")


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    made = Processes()
    yield made
    made.close()


def program(tmp_path: Path, *argv: str, **changes: object) -> Program:
    return msgspec.structs.replace(Program(argv=argv, log=str(tmp_path / "log"), mark=str(tmp_path)), **changes)


async def end(process: Process) -> None:
    process.kill()
    with trio.CancelScope(shield=True):
        await process.wait()
    process.close()


def running_with(mark: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in environment:
                found.append(int(entry))
    return found


async def wait_gone(mark: str) -> None:
    """Killed grandchildren are init's to reap; they need a moment to be gone."""
    with trio.fail_after(10):
        while running_with(mark):
            await trio.sleep(0.005)


async def test_output_goes_to_the_log_and_is_appended(processes: Processes, tmp_path: Path) -> None:
    for _ in range(2):
        process = await processes.spawn(program(tmp_path, "/bin/sh", "-c", "echo out; echo err >&2; exit 3"))
        assert await process.wait() == 3
        assert await process.wait() == 3, "asked again"
        process.close()
    assert (tmp_path / "log").read_text().split() == ["out", "err"] * 2
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


async def test_it_has_only_what_it_was_given(processes: Processes, tmp_path: Path) -> None:
    """Only the listed descriptors under their own numbers, a session of its own, an empty environment."""
    given = open_for_child(str(tmp_path / "given"), os.O_WRONLY | os.O_CREAT)
    withheld = os.open(tmp_path / "withheld", os.O_WRONLY | os.O_CREAT)
    os.set_inheritable(withheld, True)
    script = (
        "import os, resource; fds = {n: os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') "
        "if os.path.exists(f'/proc/self/fd/{n}')};"
        "print(sorted(int(n) for n, path in fds.items() if '/proc/' not in path), dict(os.environ), "
        "os.getsid(0) == os.getpid(), os.getcwd(), resource.getrlimit(resource.RLIMIT_CORE)[0]);"
        "os.umask(0) == 0o077 and print('private')"
    )
    os.environ["JWT_SECRET"] = "secret"
    try:
        process = await processes.spawn(program(tmp_path, sys.executable, "-c", script, fds=(given,)))
        assert await process.wait() == 0
    finally:
        del os.environ["JWT_SECRET"]
        os.close(given)
        os.close(withheld)
        process.close()
    output = (tmp_path / "log").read_text()
    assert output.startswith(f"[0, 1, 2, {given}] ")
    assert "secret" not in output and str(tmp_path) in output
    assert output.endswith("True / 0\nprivate\n")


@as_root
async def test_it_is_unprivileged_and_cannot_become_root(processes: Processes, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    script = "id -u; id -g; id -G; grep -E 'NoNewPrivs|CapEff|CapPrm' /proc/self/status; readlink /proc/self/ns/net"
    process = await processes.spawn(program(tmp_path, "/bin/sh", "-c", script, uid=12345, gid=12346))
    assert await process.wait() == 0
    process.close()
    output = (tmp_path / "log").read_text()
    assert output.startswith("12345\n12346\n12346\n")
    assert "NoNewPrivs:\t1" in output
    assert output.count("0000000000000000") == 2
    assert os.readlink("/proc/self/ns/net") not in output
    assert Path("/proc/self/status").read_text().count("NoNewPrivs:\t0"), "we ourselves gave up nothing"


async def test_it_outlives_the_event_loop_and_is_found_again(tmp_path: Path) -> None:
    first = Processes()
    process = await first.spawn(program(tmp_path, "/bin/sleep", "60"))
    name = msgspec.json.decode(msgspec.json.encode(process.identity), type=type(process.identity))
    process.close()
    second = Processes()
    assert second.find(msgspec.structs.replace(name, start_time=name.start_time + 1)) is None
    assert second.find(msgspec.structs.replace(name, boot_id="another")) is None
    found = second.find(name)
    assert found is not None and found.alive()
    found.kill()
    assert await found.wait() == -signal.SIGKILL
    assert second.find(name) is None
    found.close()


async def test_one_that_is_not_our_child_is_watched_too(processes: Processes, tmp_path: Path) -> None:
    """As after a restart of ours. Its code is init's to know."""
    pid = int(
        subprocess.run(
            ["/bin/sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"], check=True, capture_output=True, text=True
        ).stdout
    )
    adopted = processes._open(pid)
    assert adopted is not None
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(adopted.wait)
            await trio.testing.wait_all_tasks_blocked()
            assert adopted.alive()
            adopted.kill()
    assert not adopted.alive() and adopted.returncode is None
    adopted.kill()
    adopted.close()
    adopted.close()


async def test_a_marked_one_is_found_without_its_name(processes: Processes, tmp_path: Path) -> None:
    process = await processes.spawn(program(tmp_path, "/bin/sleep", "60", mark="/run/vm/x1"))
    try:
        assert processes.find_marked("/run/vm/x") is None
        with trio.fail_after(10):  # the kernel shows the environment a moment after it has let go of our pipe
            while (found := processes.find_marked("/run/vm/x1")) is None:
                await trio.sleep(0.001)
        assert found.pid == process.pid
        found.close()
    finally:
        await end(process)
    assert processes.find_marked("/run/vm/x1") is None


async def test_a_marked_one_is_found_though_its_environment_was_emptied(processes: Processes, tmp_path: Path) -> None:
    argv = ("/usr/bin/env", "-i", "/bin/sh", "-c", "sleep 60; :", mark_argument("/run/vm/x2"))
    process = await processes.spawn(program(tmp_path, *argv, mark="/run/vm/x2"))
    try:
        with trio.fail_after(10):
            while Path(f"/proc/{process.pid}/environ").read_bytes():
                await trio.sleep(0.001)
            while (found := processes.find_marked("/run/vm/x2")) is None:
                await trio.sleep(0.001)
        assert found.pid == process.pid
        found.close()
        assert processes.find_marked("/run/vm/x") is None
    finally:
        await end(process)


async def test_a_stopped_process_is_distinguished_from_others(processes: Processes, tmp_path: Path) -> None:
    process = await processes.spawn(program(tmp_path, "/bin/sleep", "60"))
    try:
        for number, stopped in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
            process.kill(number)
            with trio.fail_after(10):
                while process.stopped() != stopped:
                    await trio.sleep(0.001)
            assert process.alive()
    finally:
        await end(process)
    assert not process.stopped()


async def test_one_that_ends_at_once_is_waited_for_all_the_same(processes: Processes, tmp_path: Path) -> None:
    for _ in range(20):
        process = await processes.spawn(program(tmp_path, "/bin/false"))
        assert await process.wait() == 1
        process.close()


async def test_a_program_that_cannot_be_started_leaves_nothing(processes: Processes, tmp_path: Path) -> None:
    with pytest.raises(SpawnFailed, match="No such file"):
        await processes.spawn(program(tmp_path, "/no/such/program"))
    with pytest.raises(SpawnFailed, match="confined"):
        await processes.spawn(program(tmp_path, "/bin/sleep", "60", cgroup=str(tmp_path / "no-group")))
    with trio.CancelScope() as scope:
        scope.cancel()
        await processes.spawn(program(tmp_path, "/bin/sleep", "60"))
    assert scope.cancelled_caught
    assert running_with(str(tmp_path)) == []


@pytest.mark.real
async def test_it_is_put_into_its_control_group(processes: Processes, tmp_path: Path) -> None:
    root = next((path for path in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")) if _is_v2(path)), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no writable cgroup v2 here")
    group = root / f"hypeman-test-{os.getpid()}"
    group.mkdir()
    try:
        process = await processes.spawn(program(tmp_path, "/bin/sleep", "60", cgroup=str(group)))
        assert (group / "cgroup.procs").read_text().split() == [str(process.pid)]
        await end(process)
    finally:
        group.rmdir()


def _is_v2(path: Path) -> bool:
    return (path / "cgroup.controllers").exists()


async def test_a_tool_answers(processes: Processes) -> None:
    assert await processes.run(["/bin/cat"], stdin=b"hello") == b"hello"
    assert await processes.run(["/bin/sh", "-c", "echo $MORE"], env={"MORE": "yes"}) == b"yes\n"
    assert await processes.run(["/bin/true"], stdin=b"x" * 1_000_000) == b"", "it need not read what it is given"


async def test_a_tools_failure_carries_its_own_words(processes: Processes) -> None:
    with pytest.raises(ToolFailed, match=r"code 4.*: too bad") as caught:
        await processes.run(["/bin/sh", "-c", "echo half; echo too bad >&2; exit 4"])
    assert caught.value.returncode == 4 and caught.value.output == b"half\n"
    with pytest.raises(ToolFailed, match="SIGKILL"):
        await processes.run(["/bin/sh", "-c", "kill -9 $$"])
    with pytest.raises(ToolFailed, match="cannot be started"):
        await processes.run(["/no/such/tool"])


@pytest.mark.parametrize(
    ("script", "limits", "message"),
    [
        ("sleep 60", {"timeout": 0.2}, "did not end within 0.2 s"),
        ("echo one; sleep 60", {"quiet_limit": 0.2}, "printed nothing for 0.2 s"),
        ("yes", {"max_output": 10_000}, "more than 10000 bytes"),
    ],
)
async def test_a_tool_is_held_to_its_limits(
    processes: Processes, tmp_path: Path, script: str, limits: dict[str, float], message: str
) -> None:
    """And its children go with it."""
    with pytest.raises(ToolFailed, match=message):
        await processes.run(["/bin/sh", "-c", f"({script}); true"], env={"MINE": str(tmp_path)}, **limits)  # type: ignore[arg-type]
    await wait_gone(str(tmp_path))


async def test_a_cancelled_tool_is_gone_with_its_children(processes: Processes, tmp_path: Path) -> None:
    with trio.move_on_after(0.2) as scope:
        await processes.run(["/bin/sh", "-c", "sleep 60 & sleep 60"], env={"MINE": str(tmp_path)})
    assert scope.cancelled_caught
    await wait_gone(str(tmp_path))


async def test_tools_get_no_secrets_and_no_path_of_libraries(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JWT_SECRET", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    output = await processes.run(["/usr/bin/env"])
    assert b"secret" not in output and b"LD_" not in output


# Loans


@as_root
async def test_a_lent_file_can_be_opened_by_its_borrowers_alone(processes: Processes, tmp_path: Path) -> None:
    open_to_all = tempfile.mkdtemp(prefix="hv-")  # other users cannot pass pytest's own
    os.chmod(open_to_all, 0o711)
    file = Path(open_to_all, "memory")
    file.write_text("x")
    file.chmod(0o640)

    async def can(uid: int, how: str) -> bool:
        process = await processes.spawn(program(tmp_path, "/bin/sh", "-c", f"exec 3{how}{file}", uid=uid, gid=uid))
        code = await process.wait()
        process.close()
        return code == 0

    assert not await can(12345, "<")
    with temporary_access(file, 12345):
        with temporary_access(file, 12346, write=False), temporary_access(file, 12345, write=False):
            assert await can(12345, "<>")
            assert await can(12346, "<") and not await can(12346, "<>")
            assert not await can(12347, "<")
        assert await can(12345, "<>") and not await can(12346, "<")
    assert not await can(12345, "<")
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listxattr(file) == []
    shutil.rmtree(open_to_all)


@as_root
def test_a_file_that_all_may_read_gets_no_acl(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_text("x")
    file.chmod(0o644)
    with temporary_access(file, 12345, write=False):
        assert os.listxattr(file) == []
    with temporary_access(file, 12345):
        assert file.stat().st_mode & 0o777 == 0o664, "all others can still read; the group bits show the mask"
    assert file.stat().st_mode & 0o777 == 0o644


def test_an_acl_is_in_the_kernels_form() -> None:
    assert encode_acl(0o600, {1000: 6}).hex() == (
        "02000000" "01000600ffffffff" "02000600e8030000" "04000000ffffffff" "10000600ffffffff" "20000000ffffffff"
    )  # fmt: skip
    assert encode_acl(0o644, {1000: 4}).hex() == (
        "02000000" "01000600ffffffff" "02000400e8030000" "04000400ffffffff" "10000400ffffffff" "20000400ffffffff"
    )  # fmt: skip


@as_root
@pytest.mark.parametrize(
    ("mode", "gid", "groups"),
    [
        (0o660, 108, [108]),
        (0o666, 108, []),
        (0o600, 108, []),
        (0o640, 108, []),
        (0o660, 0, []),
    ],
    ids=["its group may", "everybody may", "only root may", "the group may only read", "never root's group"],
)
def test_a_program_joins_the_groups_of_its_devices(tmp_path: Path, mode: int, gid: int, groups: list[int]) -> None:
    device = tmp_path / "kvm"
    device.touch()
    os.chown(device, 0, gid)
    device.chmod(mode)
    assert groups_for([str(device), str(tmp_path / "missing")]) == groups
