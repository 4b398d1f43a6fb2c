"""Hostile archives, one table, through every entry point: a pulled layer, an image import, a volume.

Each case ends in the same way everywhere: refused with a reason, or taken in with all names inside of the root,
as in a chroot. In either case the host is as it was: ``canary`` is neither read, written, linked nor changed in
mode, and no file has appeared anywhere. (``backup restore`` unpacks onto the host: its stricter cases are in
``tests/test_backup.py``.)
"""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import zstandard

from hypeman.errors import InvalidRequest
from hypeman.host.disks import Disks
from hypeman.host.files import Files
from hypeman.host.processes import Processes
from hypeman.images.convert import fill_volume
from hypeman.images.types import CreateImageRequest, ImageStatus
from hypeman.paths import Paths
from hypeman.store import Store
from hypeman.volumes.service import Volumes
from hypeman.volumes.types import CreateVolumeRequest
from tests.images.conftest import Start
from tests.images.faults import FaultyRegistry
from tests.images.layout import (
    ImageFiles,
    archive_directory,
    directory,
    entry,
    hard_link,
    in_pieces,
    sha256,
    symlink,
    tar,
)

SECRET = b"a root file that no archive may reach\n"
MAX = 64 << 20
"""Bytes that an image of these tests may have."""
ENTRIES = 5000


def beyond_path_max(host: str, *, read: bool) -> bytes:
    """The attack of CVE-2025-4517: the real form of a path exceeds PATH_MAX, where checks follow no links."""
    name, steps, path = "d" * 247, "abcdefghijklmnop", ""
    entries = []
    for step in steps:
        entries += [directory(path + name), symlink(path + step, name)]
        path += name + "/"
    long_link = "/".join(steps) + "/" + "l" * 254
    entries.append(symlink(long_link, "../" * len(steps)))
    entries.append(symlink("escape", long_link + "/.." * len(steps) + host))
    entries += [hard_link("taken", "escape/canary")] if read else [entry("escape/canary", data=b"overwritten")]
    return tar(*entries)


def header(name: bytes, size: int = 0, kind: bytes = b"0") -> bytes:
    """A ustar header that Python's writer would refuse to make."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, b"ustar\00000"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse(size: int) -> bytes:
    info, data = entry("hole", data=b"")
    info.pax_headers = {"GNU.sparse.map": "", "GNU.sparse.realsize": str(size), "GNU.sparse.numblocks": "0"}
    return tar((info, data))


def many_members(content: bytes = b"") -> bytes:
    """As in walls.md: a stream of 300,000 gzip members that are empty, or nearly."""
    return gzip.compress(tar(entry("f"))) + gzip.compress(content) * 300_000


def zstd_bomb() -> bytes:
    return zstandard.compress(header(b"zeros", 8 << 30)) + zstandard.compress(bytes(64 << 20)) * 128


REFUSED: dict[str, tuple[Callable[[str], bytes], str]] = {
    "a hard link beyond PATH_MAX": (lambda host: beyond_path_max(host, read=True), "does not exist"),
    "a hard link to a host file": (lambda host: tar(hard_link("taken", host + "/canary")), "does not exist"),
    "a hard link that climbs": (lambda host: tar(hard_link("taken", "../" * 40 + host + "/canary")), "does not exist"),
    "a hard link through a link": (
        lambda host: tar(symlink("e", host), hard_link("taken", "e/canary")), "does not exist",
    ),
    "a hard link to itself": (lambda host: tar(hard_link("a", "a")), "does not exist"),
    "a hard link to a directory": (lambda host: tar(directory("d"), hard_link("e", "d")), "is a directory"),
    "a loop of links": (lambda host: tar(symlink("a", "b"), symlink("b", "a"), entry("a/x")), "too many symbolic"),
    "a name longer than PATH_MAX": (lambda host: tar(entry("/".join(["y" * 200] * 30))), "longer than 4096"),
    "a component that is too long": (lambda host: tar(entry("y" * 256)), "take 255"),
    "below a file": (lambda host: tar(entry("f"), entry("f/g")), "not a directory"),
    "below a device": (lambda host: tar(entry("f", tarfile.CHRTYPE, devmajor=1), entry("f/g")), "not a directory"),
    "the root as a file": (lambda host: header(b"./.") + bytes(1024), "not a directory"),
    "the root as a link": (lambda host: tar(symlink("/", host)), "not a directory"),
    "an unknown type": (lambda host: header(b"x", kind=b"Z") + bytes(1024), "unknown type"),
    "more than it has": (lambda host: header(b"f", 1 << 20) + bytes(1024), "in the middle of an entry"),
    "garbage": (lambda host: os.urandom(4096).replace(b"\x1f", b"x"), "checksum"),
    "an extended header of 1 GiB": (lambda host: header(b"x", 1 << 30, b"x"), "extended header of"),
    "too many xattrs": (
        lambda host: tar(entry("x", xattrs={f"user.{n}": "v" * 60000 for n in range(3)})), "extended attributes",
    ),
    "a hole of 4 EiB": (lambda host: sparse(1 << 62), "has a sparse file of|has a file of"),
    "300,000 empty gzip members": (lambda host: many_members(), "gzip members"),
    "300,000 gzip members of a byte": (lambda host: many_members(b"x"), "gzip members"),
    "a Zstandard bomb": (lambda host: zstd_bomb(), "more than the|more content than"),
    "xz": (lambda host: b"\xfd7zXZ\0" + bytes(500), "compressed with xz"),
    "bzip2": (lambda host: b"BZh9" + bytes(500), "compressed with bzip2"),
    "a gzip stream that ends too early": (
        lambda host: gzip.compress(tar(entry("f", data=os.urandom(9000))))[:5000], "cut off|damaged",
    ),
    "garbage behind gzip": (lambda host: gzip.compress(tar(entry("f"))) + b"garbage", "damaged|cut off"),
}  # fmt: skip

CONTAINED: dict[str, tuple[Callable[[str], bytes], tuple[str, ...]]] = {
    "a write beyond PATH_MAX": (lambda host: beyond_path_max(host, read=False), ("{host}/canary",)),
    "an absolute name": (lambda host: header(f"{host}/canary".encode()) + bytes(1024), ("{host}/canary",)),
    "a name that climbs": (lambda host: tar(entry("../" * 40 + host.strip("/") + "/canary")), ("{host}/canary",)),
    "a name that climbs from the middle": (lambda host: tar(entry("x/../../y")), ("/y",)),
    "a link to a host directory": (lambda host: tar(symlink("o", host), entry("o/canary")), ("{host}/canary",)),
    "a link that climbs": (lambda host: tar(symlink("o", "../" * 40 + "etc"), entry("o/passwd")), ("/etc/passwd",)),
    "a link through a link": (
        lambda host: tar(symlink("a", "b/.."), symlink("b", host), entry("a/x")), ("{parent}/x",),
    ),
    "a link that is replaced": (
        lambda host: tar(symlink("a", host), directory("a"), entry("a/canary")), ("/a/canary",),
    ),
    "a file over a link": (lambda host: tar(symlink("a", f"{host}/canary"), entry("a", data=b"x")), ("/a",)),
    "an entry for the root": (lambda host: header(b"/", kind=b"5") + tar(entry("f")), ("/f",)),
    "an absolute hard link": (lambda host: tar(entry("f"), hard_link("/g", "/f")), ("/f", "/g")),
    "devices and setuid": (
        lambda host: tar(entry("sda", tarfile.BLKTYPE, devmajor=8), entry("su", mode=0o6755), entry("p", b"6")),
        ("/sda", "/su", "/p"),
    ),
    "names of all bytes": (lambda host: tar(entry("a\nb\"'\\ $(id);"), entry("\udcff\udcfe")), ()),
}  # fmt: skip

Taken = Callable[[bytes], Awaitable[Path]]


class Refused(Exception):
    pass


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "host" / "canary"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture(params=["layer", "import", "volume"])
def take(
    request: pytest.FixtureRequest, registry: FaultyRegistry, make_images: Start, store: Store, paths: Paths
) -> Taken:
    """Takes an archive in through one entry point; the disk, or Refused."""

    async def image(data: bytes) -> Path:
        files = ImageFiles([data], compression="none", diff_ids=[sha256(plain_of(data))])
        images = await make_images(insecure_registries=(registry.host,), max_image_size=MAX, max_image_entries=ENTRIES)
        if request.param == "layer":
            registry.serve("evil", files)
            name = f"{registry.host}/evil"
            await images.create(CreateImageRequest(name))
        else:
            name = "evil"
            layout = files.write_layout(paths.tmp / "layout")
            archive = archive_directory(layout)
            subprocess.run(["rm", "-r", layout], check=True)
            await images.import_archive(in_pieces(archive, 1 << 20), name=name)
        made = await images.wait_final(name)
        if made.status is ImageStatus.FAILED:
            raise Refused(made.error)
        return (await images.wait_ready(name)).disk

    async def volume(data: bytes) -> Path:
        files = Files()
        disks = Disks(files, Processes(), paths.templates)
        fill = partial(fill_volume, trio.CapacityLimiter(1))
        volumes = Volumes(store=store, paths=paths, files=files, disks=disks, fill=fill)
        try:
            made = await volumes.create_from_archive(
                CreateVolumeRequest(name="evil", size_gb=1), in_pieces(data, 1 << 20)
            )
        except InvalidRequest as error:
            assert not list(paths.volumes.iterdir())
            raise Refused(error.message) from None
        disk = paths.volume_disk(made.id)
        subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)
        return disk

    return volume if request.param == "volume" else image


def plain_of(data: bytes) -> bytes:
    """What a layer's digest is taken of, where it is small; bombs are refused before it matters."""
    try:
        if data[:2] == b"\x1f\x8b" and len(data) < 1 << 20:
            return gzip.decompress(data)
    except (OSError, EOFError):
        pass
    return data


def host_files(tmp_path: Path, paths: Paths) -> dict[str, tuple[object, ...]]:
    """Everything below ``tmp_path`` except what the services keep there, with its metadata."""
    found: dict[str, tuple[object, ...]] = {}
    for where, folders, files in os.walk(tmp_path):
        if Path(where) == paths.data_dir:
            folders.clear()
        for name in (*folders, *files):
            status = os.lstat(os.path.join(where, name))
            if not (Path(where) / name).is_relative_to(paths.data_dir):
                found[os.path.join(where, name)] = (
                    status.st_ino, status.st_mode, status.st_nlink, status.st_size, status.st_uid, status.st_mtime_ns,
                )  # fmt: skip
    return found


@pytest.mark.parametrize("case", REFUSED)
async def test_refused(case: str, take: Taken, canary: Path, tmp_path: Path, paths: Paths) -> None:
    make, reason = REFUSED[case]
    before = host_files(tmp_path, paths)
    with trio.fail_after(120), pytest.raises(Refused, match=reason):
        await take(make(str(canary.parent)))
    assert canary.read_bytes() == SECRET and host_files(tmp_path, paths) == before
    assert not list(paths.tmp.iterdir())


@pytest.mark.parametrize("case", CONTAINED)
async def test_contained(case: str, take: Taken, canary: Path, tmp_path: Path, paths: Paths) -> None:
    make, names = CONTAINED[case]
    before = host_files(tmp_path, paths)
    with trio.fail_after(120):
        disk = await take(make(str(canary.parent)))
    assert canary.read_bytes() == SECRET and host_files(tmp_path, paths) == before
    assert SECRET not in disk.read_bytes()
    for name in names:
        assert exists(disk, name.format(host=canary.parent, parent=canary.parent.parent)), name


def exists(disk: Path, name: str) -> bool:
    """Whether a disk has a file of that name, as the tools of its file system see it."""
    if disk.suffix == ".raw":
        shown = subprocess.run(["debugfs", "-R", f"stat {name}", disk], capture_output=True, text=True, check=True)
        return "Inode:" in shown.stdout
    shown = subprocess.run(["dump.erofs", f"--path={name}", disk], capture_output=True, text=True, check=False)
    return "Path : " in shown.stdout or "NID:" in shown.stdout


@pytest.fixture
def volumes(store: Store, paths: Paths) -> Volumes:
    files = Files()
    disks = Disks(files, Processes(), paths.templates)
    return Volumes(
        store=store, paths=paths, files=files, disks=disks, fill=partial(fill_volume, trio.CapacityLimiter(1))
    )


async def test_a_volume_keeps_all_that_an_archive_says(volumes: Volumes, paths: Paths) -> None:
    """Owners, modes, times, xattrs, hard links, devices, long names and holes; e2fsck finds nothing."""
    hole = entry("hole", data=b"end!")
    hole[0].pax_headers = {
        "GNU.sparse.map": f"{100 << 20},4", "GNU.sparse.realsize": str(200 << 20), "GNU.sparse.numblocks": "1",
    }  # fmt: skip
    nothing = entry("nothing", data=b"")
    nothing[0].pax_headers = {"GNU.sparse.map": "", "GNU.sparse.realsize": "50000", "GNU.sparse.numblocks": "0"}
    data = tar(
        directory("d", uid=70000, gid=80000, mode=0o2750), entry("d/f", data=b"hello" * 9000, mode=0o4751, uid=1000),
        hard_link("d/g", "d/f"), entry("x", data=b"1", xattrs={"user.a": "b", "security.c": "d" * 2000}),
        entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3), symlink("short", "d/f"), symlink("long", "y" * 300),
        entry("z" * 255, data=b"2"), entry(".wh.kept", data=b"3"), hole, entry("twice", data=b"x" * 90_000),
        entry("twice", data=b"second"), directory("empty"), nothing,
    )  # fmt: skip
    made = await volumes.create_from_archive(
        CreateVolumeRequest(name="v", size_gb=1), in_pieces(zstandard.compress(data))
    )
    disk = paths.volume_disk(made.id)
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)

    def debugfs(command: str) -> str:
        return subprocess.run(["debugfs", "-R", command, disk], capture_output=True, text=True, check=True).stdout

    assert "User: 70000   Group: 80000" in debugfs("stat /d") and "Mode:  02750" in debugfs("stat /d")
    file = debugfs("stat /d/f")
    assert "Mode:  04751" in file and "User:  1000" in file and "Links: 2" in file
    assert debugfs("stat /d/g") == file and debugfs("cat /d/g") == "hello" * 9000
    assert 'user.a (1) = "b"' in debugfs("ea_list /x") and "security.c (2000)" in debugfs("ea_list /x")
    assert "Device major/minor number: 01:03" in debugfs("stat /null")
    assert 'Fast link dest: "d/f"' in debugfs("stat /short") and debugfs("cat /long") == "y" * 300
    assert debugfs("cat /" + "z" * 255) == "2" and debugfs("cat /.wh.kept") == "3" and debugfs("cat /twice") == "second"
    assert "Size: 209715200" in debugfs("stat /hole") and "Blockcount: 8" in debugfs("stat /hole")
    assert "Size: 50000" in debugfs("stat /nothing") and "Blockcount: 0" in debugfs("stat /nothing")
    assert "Type: directory" in debugfs("stat /empty") and "Type: directory" in debugfs("stat /lost+found")


@pytest.mark.parametrize("count", [40_000, 70_000])
async def test_as_many_files_as_a_volume_has_inodes(count: int, volumes: Volumes, paths: Paths) -> None:
    """In one directory, within linear time; one file more is refused, as too large."""
    names = b"".join(header(b"d/%d" % number) for number in range(count)) + bytes(1024)
    create = partial(volumes.create_from_archive, CreateVolumeRequest(name="v", size_gb=1), in_pieces(names, 1 << 20))
    if count > 65_536:
        with pytest.raises(InvalidRequest, match="inodes") as caught:
            await create()
        assert caught.value.code == "archive_too_large" and not list(paths.volumes.iterdir())
        return
    disk = paths.volume_disk((await create()).id)
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)


async def test_a_volume_that_is_full(volumes: Volumes, paths: Paths) -> None:
    """More content than there is space for, in files that each would fit: refused, as too large."""
    zeros = zstandard.compress(header(b"a", 512 << 20) + bytes(512 << 20))
    more = zstandard.compress(header(b"b", 512 << 20) + bytes(512 << 20))
    with pytest.raises(InvalidRequest) as caught:
        await volumes.create_from_archive(CreateVolumeRequest(name="v", size_gb=1), in_pieces(zeros + more, 1 << 20))
    assert caught.value.code == "archive_too_large" and not list(paths.volumes.iterdir())


async def test_a_slow_image_lets_others_pass(registry: FaultyRegistry, make_images: Start) -> None:
    """With one conversion at a time, an image that takes long does not keep a small one waiting."""
    zeros = zstandard.compress(bytes(64 << 20))
    blob = zstandard.compress(header(b"zeros", 64 << 30)) + zeros * 1024
    slow = ImageFiles([blob], compression="none", media_type="application/vnd.oci.image.layer.v1.tar+zstd")
    registry.serve("slow", slow)
    registry.serve("quick", ImageFiles([tar(entry("f", data=b"x"))]))
    images = await make_images(insecure_registries=(registry.host,), max_image_size=100 << 30)
    await images.create(CreateImageRequest(f"{registry.host}/slow"))
    with trio.fail_after(120):
        while not (await images.progress(f"{registry.host}/slow")).converted_bytes:
            await trio.sleep(0.05)
        await images.create(CreateImageRequest(f"{registry.host}/quick"))
        made = await images.wait_final(f"{registry.host}/quick")
    assert made.status is ImageStatus.READY
    assert not (await images.get(f"{registry.host}/slow")).status.is_final
