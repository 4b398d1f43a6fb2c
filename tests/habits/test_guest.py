"""The table of habits, on a real kernel: two boots of one guest answer all of it."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio

from hypeman.guest.boot import Ulimit
from hypeman.guest.client import GuestClient
from hypeman.guest.clock import Sample
from tests.guest.test_agent_exec import run
from tests.guest.test_real_guest import boot_config, booted, check_clock, kernel
from tests.habits.image import make_image
from tests.habits.rows import DOCKER_NEEDS, FIRST_BOOT, IN_THE_LOG, PODMAN_NEEDS, SECOND_BOOT, Row, render

pytestmark = [pytest.mark.real, pytest.mark.slow]

__all__ = ["kernel"]  # a fixture

VOLUMES = ("/data", "/data/deep/er", "/var/lib/app", "/opt/empty", "/etc/inittab")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("habits"), tmp_path_factory.mktemp("images") / "habits.erofs")


CLOCK_WAIT_MS = 3000
"""ext/guest_agent/workload.c: how long the first program waits for the host to set the clock."""


async def differences(client: GuestClient, rows: Iterable[Row]) -> list[str]:
    """The rows that do not hold, and what the guest gave."""
    found = []
    for row in rows:
        result, out, err = await run(client, "sh", "-c", row.script, user=row.user)
        given = "\n".join(line.rstrip() for line in (out + err).decode().rstrip().split("\n"))
        given = given or result.message
        if given != row.gives and not (row.gives.startswith("…") and row.gives[2:] in given):
            found.append(f"{row.what}: {given!r} instead of {row.gives!r}")
    return found


async def test_the_table(kernel: Path, image: Path, tmp_path: Path) -> None:
    config = boot_config("start", "sleep", "1000", volume_dirs=VOLUMES)
    async with booted(config, image, kernel, tmp_path) as guest, guest.connect() as client:
        first = client.last_correction
        assert not (wrong := await differences(client, FIRST_BOOT)), "\n".join(wrong)
        await check_the_first_program_had_the_time(client, guest.console, first)
        await check_a_wrong_clock_is_corrected(client)
        if (kernel / "release").read_text().strip().endswith("-hypeman"):
            await check_kernel_options(client)
        with trio.fail_after(10):
            while not all(line in guest.console for line in IN_THE_LOG):
                await trio.sleep(0.05)
        await client.shutdown(grace_seconds=0.1)
        await guest.wait_exit()

    config = boot_config(
        "entry",
        "/sbin/init",
        volume_dirs=VOLUMES,
        shm_bytes=80 << 20,
        sysctls=("net.core.somaxconn=99",),
        ulimits=(Ulimit(7, 100, 200),),
    )
    async with booted(config, image, kernel, tmp_path) as guest, guest.connect() as client:
        with trio.fail_after(20):
            while b"init is up" not in guest.console:
                await trio.sleep(0.05)
        assert not (wrong := await differences(client, SECOND_BOOT)), "\n".join(wrong)
    assert b"entry script of process 1\n" in guest.console


async def check_the_first_program_had_the_time(client: GuestClient, console: bytes, first: Sample | None) -> None:
    """The time of the start of the machine, as the first program's clock has it and as the right clock has it."""
    await check_clock(client)
    _, out, _ = await run(client, "start")
    starts = []
    for text in (console, out):
        words = next(line for line in text.split(b"\n") if line.startswith(b"clock ")).split()
        starts.append(int(words[1]) - int(words[2]))
    assert first is not None and client.last_correction is not None and client.ready is not None
    ends = list(client.ready.phases_ms.items())
    at = [phase for phase, _ in ends].index("clock")
    if ends[at][1] - ends[at - 1][1] >= CLOCK_WAIT_MS:
        return  # a host this busy did not set it in time, and the guest goes on without
    slack = 2 * (first.uncertainty + client.last_correction.uncertainty)
    assert abs(starts[0] - starts[1]) < 50_000_000 + slack


async def check_a_wrong_clock_is_corrected(client: GuestClient) -> None:
    """After a pause, during which the guest's clock stood still; here the test has set it."""
    await run(client, "date", "-s", "@1700000000")
    client.hold(True)
    client.hold(False)
    with trio.fail_after(20):
        while (await client.read_clock()).behind > 10**9:
            await trio.sleep(0.05)
    await check_clock(client)


async def check_kernel_options(client: GuestClient) -> None:
    _, packed, _ = await run(client, "cat", "/proc/config.gz")
    options = set(gzip.decompress(packed).decode().split("\n"))
    assert [name for name in (DOCKER_NEEDS + PODMAN_NEEDS).split() if f"CONFIG_{name}=y" not in options] == []


async def test_a_sysctl_that_the_kernel_refuses_is_reported(kernel: Path, image: Path, tmp_path: Path) -> None:
    config = boot_config("start", sysctls=("vm.no_such_thing=1",))
    async with booted(config, image, kernel, tmp_path) as guest:
        await guest.wait_exit()
    assert b"cannot set the sysctl vm.no_such_thing=1: No such file or directory" in guest.console


def test_the_document_is_the_table() -> None:
    assert Path(__file__).with_name("README.md").read_text() == render()
