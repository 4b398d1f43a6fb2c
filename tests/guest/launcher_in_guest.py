"""The launcher's walls on a kernel of the architecture under test: run inside a guest, since user-mode emulation knows
no seccomp. `make test-arm64` names this file; on this machine's own architecture tests/walls shows the same.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import TOP
from tests.guest.test_agent_exec import run
from tests.guest.test_real_guest import boot_config, booted, kernel, make_erofs
from tests.machine import COMPILER, busybox

__all__ = ["kernel"]
pytestmark = [pytest.mark.real, pytest.mark.slow]

PROBE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TRY(what) do { errno = 0; long got = (what); printf("%s %d\n", #what, got < 0 ? errno : 0); } while (0)
int main(void)
{
    TRY(mount("none", "/", "tmpfs", 0, 0));
    TRY(mknodat(-100, "/x", S_IFCHR, 0));
    TRY(syscall(__NR_keyctl, 0, 0));
    TRY(syscall(__NR_bpf, 0, 0, 0));
    TRY(unshare(0));
    TRY(socket(AF_VSOCK, SOCK_STREAM, 0));
    TRY(socket(AF_INET, SOCK_DGRAM, 0));
    TRY(socket(AF_UNIX, SOCK_STREAM, 0));
    TRY(getuid() == 1000 ? 0 : -1);
    TRY(access("/bin/busybox", F_OK));
    return 0;
}
"""
REFUSED, NO_FAMILY, ABSENT = 1, 97, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("root")
    for name in ("bin", "tmp", "probe"):
        (tree / name).mkdir()
    shutil.copy(busybox(), tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "probe.c").write_text(PROBE.replace("#include <errno.h>", "#include <errno.h>\n#include <sched.h>"))
    subprocess.run([COMPILER, "-static", "-O1", "-o", tree / "probe/probe", tree / "probe.c"], check=True)
    launcher = tree / "bin/hypeman-launch"
    subprocess.run(["make", "-s", "-C", TOP / "ext/launcher", f"OUT={launcher}", f"CC={COMPILER}"], check=True)
    return make_erofs(tree, tmp_path_factory.mktemp("images") / "root.erofs")


async def test_the_launchers_walls_hold(kernel: Path, root: Path, tmp_path: Path) -> None:
    async with (
        booted(boot_config("/bin/busybox", "sleep", "1000"), root, kernel, tmp_path) as guest,
        guest.connect() as client,
    ):
        walls = ("/bin/hypeman-launch", "--net", "--uid", "1000", "--gid", "1000", "--file", "/probe")
        free, out, err = await run(client, "/probe/probe")
        assert free.exit_code == 0 and b'mount("none", "/", "tmpfs", 0, 0) 0' in out, (out, err)
        result, out, err = await run(client, *walls, "--", "/probe/probe")
    assert result.exit_code == 0, err
    answers = [int(line.rpartition(" ")[2]) for line in out.decode().splitlines()]
    assert answers == [*[REFUSED] * 5, NO_FAMILY, 0, 0, 0, ABSENT], out.decode()
