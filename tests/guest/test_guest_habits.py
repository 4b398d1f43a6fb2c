"""What images and programs expect of the machine they run on, on a real kernel: as they find it in a container."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from hypeman.guest.boot import GuestVolume, parse_outcome
from hypeman.guest.types import Fatal
from tests.guest.qemu import make_overlay
from tests.guest.test_agent_exec import run
from tests.guest.test_real_guest import NETDEV, NETWORK, boot_config, booted, kernel, shell

pytestmark = [pytest.mark.real, pytest.mark.slow]

__all__ = ["kernel"]  # a fixture


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database's image in small: a data directory with an owner, a socket directory in /run, odd entries in /etc."""
    tree = tmp_path_factory.mktemp("habits")
    for directory in ("bin", "tmp", "run/app", "etc/hosts", "var/lib/app/sub", "var/lib/bare"):
        (tree / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    for applet in (
        "sh",
        "ls",
        "cat",
        "id",
        "stat",
        "ping",
        "httpd",
        "sleep",
        "touch",
        "rm",
        "readlink",
        "find",
        "grep",
    ):
        (tree / "bin" / applet).symlink_to("busybox")
    source = tree.parent / "echo_socket.c"
    source.write_text(
        "#include <netinet/in.h>\n#include <sys/socket.h>\n"
        "int main(void) { return socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP) < 0; }\n"
    )
    subprocess.run(["gcc", "-static", "-O1", "-o", tree / "bin/echo-socket", source], check=True)
    long = ",".join(f"member{number:04}" for number in range(800))
    (tree / "etc/passwd").write_text(f"root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1000:{'B' * 3000}:/home/bob:/bin/sh\n")
    (tree / "etc/group").write_text(f"root:x:0:\nbig:x:77:{long},bob\nbob:x:1000:\n")
    (tree / "etc/hosts/kept").write_text("a directory where others have a file\n")
    data = tree / "var/lib/app"
    (tree / "etc/machine-id").write_text("")
    (data / "PG_VERSION").write_text("16\n")
    (data / "sub/secret").write_text("x" * 100_000)
    (data / "link").symlink_to("sub/secret")
    os.setxattr(data / "sub/secret", "user.note", b"kept")
    (data / "sub/secret").chmod(0o640)
    for path in (data, *data.rglob("*"), tree / "run/app"):
        os.lchown(path, 1000, 1000)
    data.chmod(0o2750)
    (tree / "run/app").chmod(0o775)
    image = tmp_path_factory.mktemp("images") / "habits.erofs"
    tree.chmod(0o755)
    subprocess.run(["mkfs.erofs", "--quiet", image, tree], check=True, capture_output=True)
    return image


async def test_what_a_container_gives(kernel: Path, image: Path, tmp_path: Path) -> None:
    config = boot_config("sleep", "1000")
    async with booted(config, image, kernel, tmp_path) as guest, guest.connect() as client:
        assert await shell(client, "stat -c '%u %a' /run/app; ! grep ' /run ' /proc/mounts") == "1000 775\n"
        assert await shell(client, "touch /run/app/socket && readlink /etc/mtab", user="bob") == "/proc/mounts\n"
        assert await shell(client, "ls /etc/hosts") == "kept\n"
        assert "gid=55 " in await shell(client, "id", user=":55") + " "
        assert "uid=1000(bob) gid=1000(bob) groups=77(big),1000(bob)" in await shell(client, "id", user="bob")
        await shell(client, "httpd -p 127.0.0.1:80 -h /tmp", user="bob")
        await shell(client, "echo-socket", user="bob")  # the socket that ping uses where it may
        limits = await shell(client, "cat /proc/sys/vm/max_map_count /proc/sys/fs/inotify/max_user_watches")
        assert limits.split() == ["262144", "1048576"]


async def test_a_fresh_volume_gets_what_it_covers(kernel: Path, image: Path, tmp_path: Path) -> None:
    """Owner, mode and content, as a named volume of Docker; no lost+found; what it has already stays."""
    config = boot_config(
        "sleep",
        "1000",
        volumes=(
            GuestVolume("v-data", "/var/lib/app"),
            GuestVolume("v-bare", "/var/lib/bare"),
            GuestVolume("v-half", "/half"),
            GuestVolume("v-base", "/mixed", readonly=True, overlay_disk_id="v-layer"),
        ),
    )
    names = ("v-data", "v-bare", "v-half", "v-base", "v-layer")
    disks = [(name, make_overlay(tmp_path / name, "64M"), False) for name in names]
    for name in (".hypeman-populating", "left-over"):  # as after a crash in the middle
        subprocess.run(["debugfs", "-w", "-R", f"write /dev/null {name}", tmp_path / "v-half"], check=True)
    listing = (
        "cd /var/lib/app && find . | while read f; do stat -c '%n %u:%g %a' $f; done; readlink link; ls -a /half /mixed"
    )
    async with booted(config, image, kernel, tmp_path, disks=disks) as guest, guest.connect() as client:
        assert sorted((await shell(client, listing)).split("\n")) == sorted(
            [
                *(". 1000:1000 2750", "./PG_VERSION 1000:1000 644", "./sub 1000:1000 755"),
                *("./sub/secret 1000:1000 640", "./link 1000:1000 777", "sub/secret"),
                *("/half:", ".", "..", "", "/mixed:", ".", "..", ""),
            ]
        )
        assert await shell(client, "cat /var/lib/app/sub/secret") == "x" * 100_000
        assert await shell(client, "ls -a /var/lib/bare") == ".\n..\n"
        await shell(client, "rm /var/lib/app/PG_VERSION; touch /var/lib/app/own", user="bob")
        await run(client, "sh", "-c", "exec sleep 0")
        await client.shutdown(grace_seconds=0.1)
        await guest.wait_exit()
    (tmp_path / "overlay.raw").unlink()
    async with booted(config, image, kernel, tmp_path, disks=disks) as guest, guest.connect() as client:
        kept = (await shell(client, "ls /var/lib/app")).split()
        assert kept == ["link", "own", "sub"], "a volume that has content is left alone"
    note = ["debugfs", "-R", "ea_get sub/secret user.note", str(tmp_path / "v-data")]
    assert "kept" in subprocess.run(note, check=True, capture_output=True, text=True).stdout
    check = subprocess.run(["e2fsck", "-fn", tmp_path / "v-data"], capture_output=True, text=True)
    assert check.returncode in (0, 12), check.stdout  # 12: its journal, of a guest that was switched off


async def test_files_of_a_volume_are_mounted_one_by_one(kernel: Path, image: Path, tmp_path: Path) -> None:
    """What lies beside them stays visible, and what leads to them is made."""
    disks = [
        ("v-conf", make_overlay(tmp_path / "v-conf", "64M"), True),
        ("v-kept", make_overlay(tmp_path / "v-kept", "64M"), False),
    ]
    for disk, place in (("v-conf", "etc/passwd"), ("v-conf", "new/deep/file"), ("v-kept", "state")):
        (tmp_path / "content").write_text(f"of {place}\n")
        commands = [f"mkdir {folder}" for folder in ("etc", "new", "new/deep") if place.startswith(f"{folder}/")]
        for command in (*commands, f"write {tmp_path / 'content'} {place}"):
            subprocess.run(["debugfs", "-w", "-R", command, tmp_path / disk], check=True, capture_output=True)
    config = boot_config(
        "sleep",
        "1000",
        volumes=(
            GuestVolume("v-conf", "/", readonly=True, files=True),
            GuestVolume("v-kept", "/var/lib/app", files=True),
        ),
    )
    async with booted(config, image, kernel, tmp_path, disks=disks) as guest, guest.connect() as client:
        assert await shell(client, "cat /etc/passwd /new/deep/file /var/lib/app/state") == (
            "of etc/passwd\nof new/deep/file\nof state\n"
        )
        beside = await shell(client, "ls /etc/group /var/lib/app/PG_VERSION; echo no > /etc/passwd || echo read-only")
        assert beside.split()[-1] == "read-only"
        await shell(client, "echo changed > /var/lib/app/state; ! ls -d /var/lib/app/lost+found /.hypeman-files")
        await client.shutdown(grace_seconds=0.1)
        await guest.wait_exit()
    kept = subprocess.run(["debugfs", "-R", "cat state", tmp_path / "v-kept"], capture_output=True, text=True)
    assert kept.stdout == "changed\n"


async def test_files_of_a_volume_win_over_what_is_written_at_boot(kernel: Path, image: Path, tmp_path: Path) -> None:
    """Read-only ones do not keep the guest from booting, writable ones are not overwritten; all are unmounted."""
    disks = [
        ("v-conf", make_overlay(tmp_path / "v-conf", "64M"), True),
        ("v-kept", make_overlay(tmp_path / "v-kept", "64M"), False),
        ("v-many", make_overlay(tmp_path / "v-many", "64M"), False),
    ]
    (tmp_path / "content").write_text("of the user\n")
    (tmp_path / "empty").write_text("")
    _write(tmp_path / "v-conf", [f"write {tmp_path / 'content'} {name}" for name in ("hostname", "machine-id")])
    _write(tmp_path / "v-kept", [f"write {tmp_path / 'content'} resolv.conf"])
    _write(tmp_path / "v-many", [f"write {tmp_path / 'empty'} {number}" for number in range(400)])
    config = boot_config(
        "sleep",
        "1000",
        machine_id="0123456789abcdef0123456789abcdef",
        network=NETWORK,
        volumes=(
            GuestVolume("v-conf", "/etc", readonly=True, files=True),
            GuestVolume("v-kept", "/etc", files=True),
            GuestVolume("v-many", "/many", files=True),
        ),
    )
    booting = booted(config, image, kernel, tmp_path, disks=disks, extra=NETDEV)
    async with booting as guest, guest.connect() as client:
        names = "/etc/hostname /etc/machine-id /etc/resolv.conf"
        assert await shell(client, f"cat {names}") == 3 * "of the user\n"
        assert len((await shell(client, "ls /many")).split()) == 400
        await client.shutdown(grace_seconds=0.1)
        await guest.wait_exit()
    state = subprocess.run(["dumpe2fs", "-h", tmp_path / "v-many"], check=True, capture_output=True, text=True).stdout
    assert [line.split(":")[1].strip() for line in state.splitlines() if "Filesystem state" in line] == ["clean"]


async def test_a_file_that_cannot_be_mounted_is_reported_however_long_its_path_is(
    kernel: Path, image: Path, tmp_path: Path
) -> None:
    disks = [("v-conf", make_overlay(tmp_path / "v-conf", "64M"), True)]
    (tmp_path / "content").write_text("of the user\n")
    _write(tmp_path / "v-conf", [f"write {tmp_path / 'content'} state"])
    below = "/etc/passwd/" + "/".join(5 * ["d" * 150])
    config = boot_config("sleep", "1000", volumes=(GuestVolume("v-conf", below, readonly=True, files=True),))
    async with booted(config, image, kernel, tmp_path, disks=disks) as guest:
        await guest.wait_exit()
    outcome = parse_outcome(guest.boot_disk, config.nonce)
    assert isinstance(outcome, Fatal)
    assert outcome.message.startswith("cannot mount the file /etc/passwd/ddd")


def _write(disk: Path, commands: Sequence[str]) -> None:
    """Execute commands of debugfs on a disk."""
    script = disk.with_suffix(".commands")
    script.write_text("".join(f"{command}\n" for command in commands))
    subprocess.run(["debugfs", "-w", "-f", script, disk], check=True, capture_output=True)


async def test_a_volume_that_is_too_small_is_reported(kernel: Path, image: Path, tmp_path: Path) -> None:
    config = boot_config("sleep", "1000", volumes=(GuestVolume("v-data", "/bin"),))
    disks = [("v-data", make_overlay(tmp_path / "v-data", "2M"), False)]
    async with booted(config, image, kernel, tmp_path, disks=disks) as guest:
        await guest.wait_exit()
    assert b"cannot copy the content of /bin to its volume: No space left on device" in guest.console
