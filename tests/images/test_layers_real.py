"""Layers as the kernel sees them on our disk, beside what ``umoci unpack`` makes of the same image."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.images.conftest import need, need_root
from tests.images.layout import ImageFiles, directory, entry, hard_link, symlink, tar
from tests.images.trees import describe, difference, make_disk, mounted

pytestmark = pytest.mark.real

NOISE = random.Random(3).randbytes(300_000)
TEXT = b"".join(b"line %d of a text that compresses\n" % n for n in range(20_000))
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0).decode()
_NOBODY = 0xFFFFFFFF
ACL = struct.pack(
    "<I" + "HHI" * 5, 2, 1, 6, _NOBODY, 2, 6, 1234, 4, 4, _NOBODY, 16, 6, _NOBODY, 32, 4, _NOBODY
).decode(errors="surrogateescape")  # fmt: skip

CASES: dict[str, list[bytes]] = {
    "every type of file": [
        tar(
            directory("d", mode=0o1777),
            entry("d/empty"),
            entry("d/small", data=b"small", mode=0o4755, uid=1000, gid=70000),
            entry("d/block", data=TEXT[:4096]),
            entry("d/block+1", data=TEXT[:4097]),
            entry("d/almost", data=TEXT[:4032]),
            entry("d/text", data=TEXT, mode=0o6711),
            entry("d/noise", data=NOISE),
            entry("d/68k", data=TEXT[: 68 << 10]),
            entry("d/68k+1", data=TEXT[: (68 << 10) + 1]),
            entry("d/64k", data=NOISE[: 64 << 10]),
            symlink("d/link", "../nowhere/at all"),
            symlink("d/long", "x" * 4000),
            symlink("d/longest", "y/" * 2047 + "z"),
            entry("d/fifo", tarfile.FIFOTYPE, mode=0o600),
            entry("d/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
            entry("d/disk", tarfile.BLKTYPE, devmajor=259, devminor=70000, uid=2**32 - 2),
            hard_link("d/hard", "d/text"),
        )
    ],
    "times": [
        tar(
            directory("t", mtime=1.5),
            entry("t/fraction", data=b"x", mtime=1234567890.123456),
            entry("t/before", data=b"x", mtime=-1000.0),
            entry("t/after", data=b"x", mtime=2**33),
            symlink("t/link", "fraction", mtime=77),
        )
    ],
    "names": [
        tar(
            directory("n"),
            entry("n/" + "a" * 255, data=b"1"),
            directory("n/" + "/".join("b" * 60 for _ in range(1))),
            entry("n/caf\udce9", data=b"latin"),
            entry("n/日本語", data=b"utf-8"),
            entry("n/new\nline", data=b"2"),
            entry("./n//./dots", data=b"3"),
            entry("n/ leading", data=b"4"),
        ),
        tar(*(entry(f"n/{'é' * 60}{n:04}", data=b"%d" % n) for n in range(500))),
        tar(entry("n/gnu" + "c" * 150, data=b"g"), symlink("n/gnulink", "d" * 200), format=tarfile.GNU_FORMAT),
    ],
    "xattrs": [
        tar(
            directory("x", xattrs={"user.dir": "1"}),
            entry("x/file", data=b"x" * 3990, xattrs={"user.one": "1", "user.two": "2" * 200, "trusted.t": "t"}),
            entry("x/many", data=TEXT, xattrs={f"user.{n}": "v" * n for n in range(40)}),
            entry("x/empty", xattrs={"user.empty": ""}),
            directory("x/sub", xattrs={"user.gone": "in the next layer"}),
        ),
        tar(directory("x/sub", xattrs={"user.new": "1"}), entry("x/many", data=b"now without")),
    ],
    "capabilities and access control lists": [
        tar(
            entry("ping", data=TEXT, mode=0o755, xattrs={"security.capability": NET_RAW}),
            entry("shared", data=b"s", mode=0o664, xattrs={"system.posix_acl_access": ACL}),
            directory("inherits", xattrs={"system.posix_acl_default": ACL}),
        ),
        tar(entry("pong", data=TEXT, mode=0o755, xattrs={"security.capability": NET_RAW})),
    ],
    "whiteouts": [
        tar(
            directory("a"), entry("a/keep", data=b"k"), entry("a/gone", data=TEXT), directory("a/dir"),
            entry("a/dir/one", data=b"1"), directory("a/dir/deep"), entry("a/dir/deep/two", data=b"2"),
            directory("b"), entry("b/old", data=b"o"), directory("b/sub"), entry("b/sub/old", data=b"o"),
            directory("c"), entry("c/old", data=b"o"),
        ),
        tar(
            directory("a"), entry("a/.wh.gone"), entry("a/.wh.dir"), directory("b"), entry("b/.wh..wh..opq"),
            entry("b/new", data=b"n"), directory("b/sub"), entry("b/sub/new", data=b"n"),
            directory("c"), entry("c/new", data=b"n"), entry("c/.wh..wh..opq"), entry("c/.wh.never-was"),
        ),
    ],
    "replacements": [
        tar(
            entry("file-to-dir", data=b"f"), directory("dir-to-file"), entry("dir-to-file/x", data=TEXT),
            symlink("link-to-dir", "dir"), directory("dir"), entry("dir/inside", data=b"i"),
            directory("dir-to-link"), entry("dir-to-link/x"), entry("mode", data=b"m", mode=0o600),
        ),
        tar(
            directory("file-to-dir"), entry("file-to-dir/y", data=b"y"), entry("dir-to-file", data=b"now a file"),
            directory("link-to-dir"), entry("link-to-dir/z", data=b"z"), directory("dir", mode=0o700, uid=5),
            symlink("dir-to-link", "dir"), entry("mode", data=b"M", mode=0o644),
        ),
    ],
    "duplicates": [
        tar(entry("twice", data=TEXT), entry("twice", data=b"second"), directory("d"), directory("d", mode=0o700)),
    ],
    "hard links across layers": [
        tar(entry("one", data=TEXT), entry("two", data=b"2"), symlink("sym", "one"), entry("four", data=b"4")),
        tar(hard_link("linked", "one"), hard_link("again", "linked"), hard_link("symtwin", "sym"),
            hard_link("four2", "four")),
        tar(entry("one", data=b"replaced: the others keep the old"), entry(".wh.four")),
    ],
    "through links": [
        tar(directory("usr"), directory("usr/bin"), symlink("bin", "usr/bin"), directory("var"),
            symlink("var/run", "/run"), directory("run"), symlink("up", "usr/../usr/bin")),
        tar(entry("bin/tool", data=b"t"), entry("var/run/pid", data=b"1"), entry("up/other", data=b"o"),
            hard_link("bin/twin", "up/tool")),
    ],
    "a large directory": [tar(directory("big"), *(entry(f"big/{n:05}", data=b"x") for n in range(3000)))],
    "nothing at all": [],
    "an empty layer": [tar(), tar(entry("x"))],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_tree_as_umoci(case: str, tmp_path: Path) -> None:
    """Type, mode, owner, times, xattrs, content and hard-link sets agree, entry by entry."""
    need_root()
    need("umoci")
    layers = [tar(directory("./", mode=0o755)), *CASES[case]]
    check_against_umoci(ImageFiles(layers), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=["gnu", "0.0", "0.1", "1.0"],
)
def test_sparse_files(options: list[str], tmp_path: Path) -> None:
    """All four ways in which GNU tar writes holes give the same bytes, and holes stay holes."""
    need_root()
    need("tar")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, size, pieces in (
        ("hole-first", 5 << 20, [(4 << 20, TEXT)]),
        ("many", 3 << 20, [(n * 40_960, NOISE[n * 10 : n * 10 + 4096 + n]) for n in range(70)]),
        ("end", (1 << 20) + 100, [((1 << 20) - 50, b"x" * 150)]),
        ("only-a-hole", 10 << 20, []),
        ("odd", 70_001, [(65_530, b"across a chunk")]),
    ):
        with open(tree / name, "wb") as file:
            file.truncate(size)
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
    packed = subprocess.run(
        ["tar", "-c", "-S", *options, "--mtime=@1600000000", "-C", tree, "."], check=True, capture_output=True
    )
    theirs = tmp_path / "theirs"  # umoci does not know the first format, so GNU tar itself is asked
    theirs.mkdir()
    subprocess.run(["tar", "-x", "-p", "-C", theirs], input=packed.stdout, check=True)
    disk = tmp_path / "root.erofs"
    disk.write_bytes(make_disk([packed.stdout]))
    fsck(disk)
    with mounted(disk) as root:
        assert not difference(describe(root), describe(theirs))
    assert os.path.getsize(disk) < 5 << 20  # of 19 MiB


@pytest.mark.slow
def test_a_whole_distribution(tmp_path: Path, debian_layer: bytes) -> None:
    """A Debian root in two layers, the second with everything that apt and a cleaning up leave."""
    need_root()
    need("umoci")
    second = tar(
        entry("etc/motd", data=b"changed\n"),
        directory("var/cache/apt"),
        entry("var/cache/apt/.wh..wh..opq"),
        entry("usr/share/.wh.doc"),
        hard_link("usr/bin/perl2", "usr/bin/perl"),
    )
    image = ImageFiles([debian_layer, second], compression="none")
    check_against_umoci(image, tmp_path, without_times=frozenset([b"usr/share"]))


def fsck(disk: Path) -> None:
    """What erofs-utils say of a disk, all data decoded."""
    need("fsck.erofs")
    check = subprocess.run(["fsck.erofs", "--extract", disk], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def check_against_umoci(image: ImageFiles, tmp_path: Path, *, without_times: frozenset[bytes] = frozenset()) -> None:
    image.write_layout(tmp_path / "oci")
    subprocess.run(
        ["umoci", "unpack", "--image", f"{tmp_path}/oci:latest", tmp_path / "bundle"], check=True, capture_output=True
    )
    disk = tmp_path / "root.erofs"
    disk.write_bytes(make_disk(image.layers))
    fsck(disk)
    with mounted(disk) as root:
        ours = describe(root, without_times=without_times)
    theirs = describe(tmp_path / "bundle" / "rootfs", without_times=without_times)
    assert not difference(ours, theirs)


def random_layers(chance: random.Random) -> list[bytes]:
    """Two to five layers of everything, such that most are legal: directories stay directories mostly."""
    directories = ["d", "d/e", "f", "f/g"]
    leaves = ["a", "b", "d/a", "d/b", "d/e/a", "d/e/b", "f/a", "f/g/a", "f/g/b"]
    alive: set[str] = set()

    def gone(name: str) -> None:
        alive.difference_update([other for other in alive if other == name or other.startswith(f"{name}/")])

    def member(first: bool) -> tuple[tarfile.TarInfo, bytes]:
        dice, mtime = chance.random(), 1_600_000_000 + chance.randrange(1000)
        name = chance.choice(directories + leaves if dice > 0.93 or dice < 0.2 else leaves)
        if dice < 0.2 and not first:
            gone(name)
            return entry(os.path.join(os.path.dirname(name), f".wh.{os.path.basename(name)}"))
        if dice < 0.28 and not first:
            gone(opaque := chance.choice(directories))
            alive.add(opaque)
            return entry(f"{opaque}/.wh..wh..opq")
        if dice < 0.45:
            return directory(chance.choice(directories), mode=chance.choice([0o700, 0o755]), uid=9, mtime=mtime)
        if dice < 0.52:
            return entry(f"via/{chance.choice('xy')}", data=b"through a link")
        targets = sorted(alive - {name, *directories})
        if dice < 0.6 and targets:
            alive.add(name)
            return hard_link(name, chance.choice(targets))
        gone(name)
        if dice < 0.7:
            return symlink(name, chance.choice(["a", "d", "../d", "/f/g", "../.."]), mtime=mtime)
        alive.add(name)
        data = chance.randbytes(chance.choice([0, 10, 3000, 5000, 70_000, 140_000]))
        return entry(name, data=data, mode=chance.choice([0o644, 0o4755]), mtime=mtime)

    layers = [tar(directory("./"), directory("target"), symlink("via", "target"))]
    for number in range(chance.randint(1, 4)):
        layers.append(tar(directory("./"), *(member(number == 0) for _ in range(chance.randint(1, 9)))))
    return layers


def test_random_layers(tmp_path: Path) -> None:
    """Hundreds of whiteouts, links and replacements in a random order."""
    need_root()
    need("umoci")
    begun = time.time_ns()
    compared = 0
    for seed in range(40):
        image = ImageFiles(random_layers(random.Random(seed)), compression="none")
        here = tmp_path / str(seed)
        image.write_layout(here / "oci")
        unpack = ["umoci", "unpack", "--image", f"{here}/oci:latest", str(here / "bundle")]
        if subprocess.run(unpack, capture_output=True).returncode != 0:
            continue  # an entry below a file, a link to nothing: we refuse these too, or need not
        theirs = describe(here / "bundle" / "rootfs")
        # Where a layer touches a directory without describing it, umoci leaves the present time on it.
        vague = frozenset(path for path, facts in theirs.items() if isinstance(facts[3], int) and facts[3] >= begun)
        (here / "disk").write_bytes(make_disk(image.layers))
        fsck(here / "disk")
        with mounted(here / "disk") as root:
            ours = describe(root, without_times=vague)
        assert not difference(ours, describe(here / "bundle" / "rootfs", without_times=vague)), f"seed {seed}"
        compared += 1
    assert compared >= 20
