"""``cp`` both ways, tar streams, and what an evil guest might send."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hypeman.cli.copy import CopyFailed, TreeWriter, checked_path, leads_out, split_remote, write_tree
from hypeman.errors import HypemanError
from hypeman.guest.types import CopyEntry, FileKind


@pytest.fixture(autouse=True)
def web(server: Any) -> None:
    server.world.instances.add("web")


def entry(path: str, **fields: Any) -> CopyEntry:
    defaults: dict[str, Any] = {"kind": FileKind.FILE, "mode": 0o644, "size": 0}
    return CopyEntry(path=path, mtime=1000, uid=os.getuid(), gid=os.getgid(), **{**defaults, **fields})


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("web:/etc", ("web", "/etc")),
        ("/a:/b", None),
        ("./a", None),
        ("web:relative", None),
        (":/x", None),
        ("-", None),
    ],
)
def test_which_side_is_the_guest(text: str, split: Any) -> None:
    assert split_remote(text) == split


def test_a_file_in(cli: Any, server: Any, tmp_path: Path) -> None:
    source = tmp_path / "file.txt"
    source.write_bytes(b"x" * 100_000)
    source.chmod(0o640)
    assert cli("cp", str(source), "web:/tmp").exit_code == 0  # into the directory
    request, data = server.world.instances.files["/tmp/file.txt"]
    assert (data, request.mode, request.uid) == (b"x" * 100_000, 0o640, 0)
    done = cli("cp", str(source), "web:/opt/new")
    assert "100000 bytes copied" in done.stderr
    assert "/opt/new" in server.world.instances.files
    full = cli("cp", str(source), "web:/full")
    assert (full.exit_code, "/full: no space left" in full.stderr) == (1, True)
    assert cli("cp", str(tmp_path / "missing"), "web:/tmp").exit_code == 1
    assert cli("cp", "a", "b").exit_code == 2


def test_a_tree_in(cli: Any, server: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "a").write_text("A")
    (tree / "sub" / "b").write_text("B")
    (tree / "link").symlink_to("a")
    os.utime(tree / "sub" / "b", (1000, 2000))
    os.utime(tree / "sub", (1000, 3000))
    assert cli("cp", str(tree), "web:/tmp").exit_code == 0
    files = {path: data for path, (_, data) in server.world.instances.files.items()}
    link = files.pop("/tmp/tree/link")
    assert files == {"/tmp/tree": None, "/tmp/tree/a": b"A", "/tmp/tree/sub": None, "/tmp/tree/sub/b": b"B"}
    requests = {path: request for path, (request, _) in server.world.instances.files.items()}
    assert (link, requests["/tmp/tree/link"].direction, requests["/tmp/tree/link"].link_target) == (b"", "link", "a")
    assert (requests["/tmp/tree/sub/b"].mtime, requests["/tmp/tree/sub"].mtime) == (2000, 3000)
    order = list(server.world.instances.files)
    assert order.index("/tmp/tree/sub") > order.index("/tmp/tree/sub/b"), "a directory gets its time last"
    server.world.instances.files.clear()
    assert cli("cp", "-L", str(tree) + "/.", "web:/tmp").exit_code == 0
    assert set(server.world.instances.files) == {"/tmp", "/tmp/a", "/tmp/link", "/tmp/sub", "/tmp/sub/b"}


def test_a_directory_that_cannot_be_read(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not left out without a word."""
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    scandir = os.scandir

    def guarded(path: str) -> Any:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    done = cli("cp", str(tmp_path / "tree"), "web:/tmp")
    assert (done.exit_code, "sub: Permission denied" in done.stderr) == (1, True)


def test_symlinks_in(cli: Any, server: Any, tmp_path: Path) -> None:
    """A symlink is copied as one, also where it leads nowhere; by its name with a slash, what it leads to."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "f").write_text("F")
    (tmp_path / "link").symlink_to("tree")
    (tmp_path / "nowhere").symlink_to("/gone/away")
    for name, target in (("link", "tree"), ("nowhere", "/gone/away")):
        assert cli("cp", str(tmp_path / name), "web:/tmp").exit_code == 0
        request, _ = server.world.instances.files[f"/tmp/{name}"]
        assert (request.direction, request.link_target) == ("link", target)
    assert cli("cp", f"{tmp_path}/link/", "web:/srv/").exit_code == 0
    assert set(server.world.instances.files) >= {"/srv/link", "/srv/link/f"}
    os.symlink(b"\xff", tmp_path / "bytes")
    done = cli("cp", str(tmp_path / "bytes"), "web:/tmp")
    assert (done.exit_code, "not UTF-8" in done.stderr) == (1, True)


def test_a_tar_in(shell: Any, server: Any) -> None:
    def tar_of(*names: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
        return buffer.getvalue()

    assert shell("cp", "-", "web:/srv", input=tar_of("./a", "b/c")).returncode == 0
    assert {path: data for path, (_, data) in server.world.instances.files.items()} == {
        "/srv/a": b"abc",
        "/srv/b/c": b"abc",
    }
    for evil in ("../x", "/etc/passwd"):
        result = shell("cp", "-", "web:/srv", input=tar_of(evil))
        assert (result.returncode, b"leads out" in result.stderr) == (1, True)
    assert shell("cp", "-", "web:/srv", input=b"no tar at all").returncode == 1


def test_hard_links_in_a_tar(shell: Any, server: Any) -> None:
    """The second name is a link to where the first one went, and that may not be outside."""

    def tar_of(leads_to: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            first = tarfile.TarInfo("./a/first")
            first.size = 3
            tar.addfile(first, io.BytesIO(b"abc"))
            second = tarfile.TarInfo("second")
            second.type, second.linkname = tarfile.LNKTYPE, leads_to
            tar.addfile(second)
        return buffer.getvalue()

    assert shell("cp", "-", "web:/srv", input=tar_of("./a/first")).returncode == 0
    request, _ = server.world.instances.files["/srv/second"]
    assert (request.direction, request.link_target) == ("hardlink", "/srv/a/first")
    for evil in ("../first", "/etc/shadow"):
        result = shell("cp", "-", "web:/srv", input=tar_of(evil))
        assert (result.returncode, b"leads out" in result.stderr) == (1, True)


def test_hard_links_in_a_tree(cli: Any, server: Any, tmp_path: Path) -> None:
    """As with cp: -a keeps them, without it each name is a file."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "first").write_text("F")
    (tree / "second").hardlink_to(tree / "first")
    for options, direction in (([], "to"), (["-a"], "hardlink")):
        assert cli("cp", *options, str(tree), "web:/tmp").exit_code == 0
        request, data = server.world.instances.files["/tmp/tree/second"]
        assert request.direction == direction
        assert (data, request.link_target) == ((b"F", "") if direction == "to" else (b"", "/tmp/tree/first"))


TREE = [
    entry("d", kind=FileKind.DIR, mode=0o500),
    entry("d/f", size=10, mode=0o4755),
    b"01234",
    b"56789",
    entry("d/l", kind=FileKind.SYMLINK, link_target="f"),
    entry("d/out", kind=FileKind.SYMLINK, link_target="/etc/shadow"),
    entry("d/empty"),
]


def test_a_tree_out(cli: Any, server: Any, tmp_path: Path) -> None:
    server.world.instances.tree = list(TREE)
    target = tmp_path / "here"
    done = cli("cp", "-a", "web:/srv/d", str(target))
    assert done.exit_code == 0, done.output
    assert "d/out" in done.stderr
    assert sorted(os.listdir(target)) == ["empty", "f", "l"]
    assert (target / "f").read_text() == "0123456789"
    assert stat.S_IMODE((target / "f").stat().st_mode) == 0o4755
    assert (target / "f").stat().st_mtime == 1000
    assert os.readlink(target / "l") == "f"
    assert (stat.S_IMODE(target.stat().st_mode), target.stat().st_mtime) == (0o500, 1000)
    into = tmp_path / "into"
    into.mkdir()
    assert cli("cp", "-q", "web:/srv/d", str(into)).stderr == done.stderr.splitlines()[0] + "\n"
    assert (into / "d" / "f").exists()


def test_a_file_out(cli: Any, server: Any, tmp_path: Path) -> None:
    server.world.instances.tree = [entry("f", size=3), b"abc"]
    assert cli("cp", "web:/f", str(tmp_path / "new")).exit_code == 0
    assert (tmp_path / "new").read_text() == "abc"
    assert cli("cp", "web:/f", str(tmp_path)).exit_code == 0
    assert (tmp_path / "f").read_text() == "abc"
    missing = cli("cp", "web:/missing", str(tmp_path / "x"))
    assert (missing.exit_code, "no such file" in missing.stderr) == (1, True)


@pytest.mark.parametrize(
    ("path", "message", "shown"),
    [
        ("/nope", "nope: No such file or directory", "web:/nope: No such file or directory"),
        ("/srv/tree/", "tree/x/y: Permission denied", "web:/srv/tree/x/y: Permission denied"),
        ("/", "the disk is full", "web:/: the disk is full"),
    ],
)
def test_what_cannot_be_copied_out_has_its_whole_name(
    cli: Any, server: Any, tmp_path: Path, path: str, message: str, shown: str
) -> None:
    server.world.instances.tree = [HypemanError(message)]
    done = cli("cp", f"web:{path}", str(tmp_path))
    assert (done.exit_code, done.stderr.splitlines()[0]) == (1, f"Error: {shown}")


def test_holes_stay_holes(cli: Any, server: Any, tmp_path: Path) -> None:
    size = 8 << 20
    zeros = [bytes(20_000)] * (size // 20_000) + [bytes(size % 20_000)]  # cut as the guest happened to send
    server.world.instances.tree = [entry("f", size=size + 1), *zeros, b"x"]
    server.world.instances.tree += [entry("g", size=size), *zeros]
    for name, end in (("f", b"x"), ("g", b"")):
        assert cli("cp", "web:/f", str(tmp_path)).exit_code == 0
        assert (tmp_path / name).read_bytes() == bytes(size) + end
        assert (tmp_path / name).stat().st_blocks * 512 < 1 << 20


def test_a_tar_out(shell: Any, server: Any) -> None:
    server.world.instances.tree = list(TREE)
    done = shell("cp", "web:/srv/d", "-")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.getnames() == ["d", "d/f", "d/l", "d/out", "d/empty"]
        assert tar.extractfile("d/f").read() == b"0123456789"  # type: ignore[union-attr]
        assert tar.getmember("d/l").linkname == "f"
        assert tar.getmember("d").isdir()
        assert tar.getmember("d/f").mode == 0o4755


@pytest.mark.parametrize(
    "evil",
    [
        [entry("../x", size=1), b"x"],
        [entry("/etc/x", size=1), b"x"],
        [entry("a/../../x", size=1), b"x"],
        [entry(".")],
        [entry("f", size=5), b"too short"[:3]],
        [entry("f", size=5), b"much too long"],
        [b"bytes of nothing"],
        [entry("d", kind=FileKind.DIR), b"bytes in a directory"],
        [entry("f", size=5), b"he", HypemanError("the guest has gone")],
    ],
)
def test_an_evil_guest(cli: Any, server: Any, tmp_path: Path, evil: list[Any]) -> None:
    server.world.instances.tree = evil
    place = tmp_path / "place"
    place.mkdir()
    done = cli("cp", "web:/x", str(place))
    assert done.exit_code == 1, done.output
    assert not [path for path in place.rglob("*") if not path.is_dir()]


def test_a_symlink_alone_is_not_skipped_in_silence(tmp_path: Path) -> None:
    link = {"path": "l", "is_dir": False, "is_symlink": True, "link_target": "f", "mode": 0o777, "size": 0}
    with pytest.raises(CopyFailed, match="nothing was copied: l is a symlink; -L"):
        write_tree(iter([link]), tmp_path / "here", archive=False)
    assert not os.path.lexists(tmp_path / "here")


def test_a_symlink_is_no_way_out(cli: Any, server: Any, tmp_path: Path) -> None:
    """A link inside the copy that is legal for itself is still not written through."""
    outside = tmp_path / "outside"
    outside.mkdir()
    place = tmp_path / "place"
    (place / "d").mkdir(parents=True)
    (place / "d" / "sub").symlink_to(outside)
    into_it = [entry("d/sub/f", size=1), b"x"]
    server.world.instances.tree = [entry("d", kind=FileKind.DIR), *into_it]
    done = cli("cp", "web:/x", str(place))
    assert (done.exit_code, "is a symlink" in done.stderr) == (1, True)
    assert os.listdir(outside) == []


def test_a_symlink_through_a_symlink_is_no_way_out(cli: Any, server: Any, tmp_path: Path) -> None:
    """Each link looks harmless as text; followed through one another they would lead above the destination."""
    place = tmp_path / "place"
    place.mkdir()
    links = [("d/e/up", ".."), ("d/out", "e/up/../.."), ("d/e/f/way", "../up/..")]
    server.world.instances.tree = [entry(path, kind=FileKind.DIR, mode=0o755) for path in ("d", "d/e", "d/e/f")]
    for path, target in links:
        server.world.instances.tree.append(entry(path, kind=FileKind.SYMLINK, link_target=target))
    done = cli("cp", "web:/x", str(place))
    assert done.exit_code == 0, done.output
    made = [found for found in place.rglob("*") if found.is_symlink()]
    assert made
    for link_path in made:
        assert link_path.resolve().is_relative_to(place / "d"), f"{link_path} leads to {link_path.resolve()}"


def test_a_directory_that_is_replaced_during_a_copy(tmp_path: Path) -> None:
    """Another program of the user's replaces a directory by a symlink between two entries."""
    outside, place = tmp_path / "outside", tmp_path / "place"
    outside.mkdir()
    place.mkdir()
    fields = {"mode": 0o644, "mtime": 1000, "uid": os.getuid(), "gid": os.getgid(), "link_target": ""}
    writer = TreeWriter(place, archive=False)
    writer.entry({"path": "d", "is_dir": True, "is_symlink": False, **fields, "mode": 0o755})
    writer.entry({"path": "d/f", "is_dir": False, "is_symlink": False, **fields})
    writer.data(b"x")
    (place / "d").rename(place / "was")
    (place / "d").symlink_to(outside)
    with pytest.raises(CopyFailed, match="is a symlink"):
        writer.finish()
    writer.abandon()
    assert os.listdir(outside) == []


def test_paths_and_links() -> None:
    def header(path: str, target: str = "") -> dict[str, Any]:
        return {"path": path, "is_symlink": bool(target), "link_target": target}

    assert checked_path(header("a/b")) == "a/b"
    with pytest.raises(CopyFailed):
        checked_path(header("a/.."))
    directories = {("d",), ("d", "e")}
    for path, target, out in (
        ("d/l", "f", False),
        ("d/e/l", "../f", False),
        ("d/l", "e/../f", False),
        ("d/l", "../f", True),
        ("d/l", "/f", True),
        ("d/l", "../d2/f", True),
        ("d/e/l", "../../d/f", True),
        ("d/l", "m/../f", True),  # m may be a link
        ("d/e/l", "../m/../../f", True),
    ):
        assert leads_out(header(path, target), directories) == out, (path, target)
