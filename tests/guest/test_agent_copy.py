"""stat and copy both ways, driven through the host's client against the real agent."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest
import trio

from hypeman.errors import Conflict, HypemanError, InvalidRequest, NotFound
from hypeman.guest.client import GuestClient
from hypeman.guest.types import CopyEntry, CopyToRequest, FileKind

from .conftest import Agent
from .test_agent_exec import wait_until


async def put(client: GuestClient, path: str, data: bytes = b"", **options: object) -> int:
    request = CopyToRequest(path=path, **options)  # type: ignore[arg-type]
    with trio.fail_after(30):
        async with await client.copy_to(request) as copy:
            await copy.send(data)
            return await copy.finish()


async def get(client: GuestClient, path: str, *, follow_links: bool = False) -> list[tuple[CopyEntry, bytes]]:
    entries: list[tuple[CopyEntry, bytes]] = []
    with trio.fail_after(30):
        async with client.copy_from(path, follow_links=follow_links) as tree:
            async for item in tree:
                if isinstance(item, CopyEntry):
                    entries.append((item, b""))
                else:
                    entries[-1] = (entries[-1][0], entries[-1][1] + item)
    return entries


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


async def test_stat(agent: Agent, client: GuestClient) -> None:
    (agent.root / "file").write_bytes(b"12345")
    (agent.root / "file").chmod(0o4751)
    (agent.root / "link").symlink_to("/file")
    (agent.root / "loop").symlink_to("loop")
    info = await client.stat("/file")
    assert (info.exists, info.is_file, info.is_dir, info.mode, info.size) == (True, True, False, 0o4751, 5)
    link = await client.stat("/link")
    assert (link.is_symlink, link.link_target) == (True, "/file")
    followed = await client.stat("/link", follow_links=True)
    assert (followed.is_file, followed.size) == (True, 5), "an absolute link starts at the guest's root"
    assert (await client.stat("/")).is_dir
    assert not (await client.stat("/none")).exists
    assert not (await client.stat("/file/below")).exists
    assert "loop" in ((await client.stat("/loop", follow_links=True)).error or "")


async def test_a_file_arrives_with_mode_owner_and_time(agent: Agent, client: GuestClient) -> None:
    data = os.urandom(1_000_003)
    assert await put(client, "/a/b/c", data, mode=0o4640, uid=12, gid=0, mtime=1_000_000_000) == len(data)
    made = agent.root / "a/b/c"
    info = made.stat()
    assert made.read_bytes() == data
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime) == (0o4640, 12, 0, 1_000_000_000)
    assert stat.S_IMODE((agent.root / "a/b").stat().st_mode) == 0o755


async def test_owner_zero_is_an_owner(agent: Agent, client: GuestClient) -> None:
    (agent.root / "dir").mkdir()
    await put(client, "/dir", kind=FileKind.DIR, uid=7, gid=8)
    assert ((agent.root / "dir").stat().st_uid, (agent.root / "dir").stat().st_gid) == (7, 8)
    await put(client, "/dir", kind=FileKind.DIR, uid=0, gid=0)
    assert ((agent.root / "dir").stat().st_uid, (agent.root / "dir").stat().st_gid) == (0, 0)


async def test_an_existing_file_is_replaced_whole(agent: Agent, client: GuestClient) -> None:
    (agent.root / "file").write_bytes(b"old content, longer")
    with (agent.root / "file").open("rb") as opened:
        await put(client, "/file", b"new")
        assert opened.read() == b"old content, longer", "who had it open keeps what was there"
    assert (agent.root / "file").read_bytes() == b"new"
    assert names(agent.root) == ["file"]


async def test_an_unfinished_copy_leaves_nothing(agent: Agent, client: GuestClient) -> None:
    (agent.root / "file").write_bytes(b"old")
    async with await client.copy_to(CopyToRequest(path="/file")) as copy:
        await copy.send(bytes(100_000))
        await wait_until(lambda: len(names(agent.root)) == 2)
    await wait_until(lambda: names(agent.root) == ["file"])
    assert (agent.root / "file").read_bytes() == b"old"


async def test_a_lost_connection_leaves_nothing(agent: Agent, client: GuestClient) -> None:
    copy = await client.copy_to(CopyToRequest(path="/file"))
    await copy.send(bytes(100_000))
    await wait_until(lambda: len(names(agent.root)) == 1)
    agent.socket.shutdown(2)
    await wait_until(lambda: names(agent.root) == [])
    with pytest.raises(HypemanError):
        await copy.finish()


async def test_directories_and_files_do_not_replace_each_other(agent: Agent, client: GuestClient) -> None:
    (agent.root / "dir").mkdir()
    (agent.root / "file").write_bytes(b"x")
    with pytest.raises(Conflict):
        await put(client, "/dir", b"data")
    with pytest.raises(NotFound):
        await put(client, "/file", kind=FileKind.DIR)
    with pytest.raises(NotFound):
        await put(client, "/file/below", b"data")
    with pytest.raises(Conflict):
        await put(client, "/", b"data")
    assert names(agent.root) == ["dir", "file"]
    assert names(agent.root / "dir") == []


async def test_symlinks(agent: Agent, client: GuestClient) -> None:
    await put(client, "/link", kind=FileKind.SYMLINK, link_target="/somewhere/else", uid=3, gid=4)
    assert os.readlink(agent.root / "link") == "/somewhere/else"
    assert (agent.root / "link").lstat().st_uid == 3
    (agent.root / "real").write_bytes(b"old")
    (agent.root / "to-real").symlink_to("/real")
    await put(client, "/to-real", b"new")
    assert (agent.root / "real").read_bytes() == b"new", "a file is written where the link leads, as cp does"
    assert (agent.root / "to-real").is_symlink()


async def test_hard_links(agent: Agent, client: GuestClient) -> None:
    (agent.root / "first").write_bytes(b"data")
    (agent.root / "dir").mkdir()
    (agent.root / "taken").write_bytes(b"old")
    for path in ("/dir/second", "/taken", "/taken"):  # twice: rename() does nothing where both are one file
        await put(client, path, kind=FileKind.HARD_LINK, link_target="/first")
        assert os.path.samefile(agent.root / "first", agent.root / path.lstrip("/"))
    assert (agent.root / "first").stat().st_nlink == 3, "and no temporary name is left"
    assert names(agent.root) == ["dir", "first", "taken"]
    with pytest.raises(NotFound):
        await put(client, "/x", kind=FileKind.HARD_LINK, link_target="/missing")
    for target in ("/dir", "/"):
        with pytest.raises(HypemanError):
            await put(client, "/x", kind=FileKind.HARD_LINK, link_target=target)
    with pytest.raises(Conflict):
        await put(client, "/dir", kind=FileKind.HARD_LINK, link_target="/first")
    with pytest.raises(InvalidRequest):
        await put(client, "/x", kind=FileKind.HARD_LINK)
    assert names(agent.root) == ["dir", "first", "taken"]


async def test_a_hard_link_to_a_file_outside_the_root(agent: Agent, client: GuestClient, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (agent.root / "out").symlink_to(tmp_path / "outside")
    for target in ("/out/secret", "/../outside/secret", str(tmp_path / "outside" / "secret")):
        with pytest.raises(HypemanError):
            await put(client, "/x", kind=FileKind.HARD_LINK, link_target=target)
    assert names(agent.root) == ["out"]


@pytest.mark.parametrize("path", ["/../escaped", "/dir/../../escaped", "/out/escaped", "/out2/escaped"])
async def test_nothing_leads_out_of_the_root(agent: Agent, client: GuestClient, tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (agent.root / "dir").mkdir()
    (agent.root / "out").symlink_to(outside)
    (agent.root / "out2").symlink_to("../outside")
    with contextlib.suppress(HypemanError):
        await put(client, path, b"x")
    assert names(outside) == []
    assert not (tmp_path / "escaped").exists()
    (outside / "secret").write_bytes(b"s")
    assert not (await client.stat("/out/secret", follow_links=True)).exists
    with pytest.raises(NotFound):
        await get(client, "/out/secret")


@pytest.mark.parametrize("name", ["", "..", "/a/..", "/" + "x" * 300, "/" + "y/" * 3000])
async def test_impossible_paths_are_refused(client: GuestClient, name: str) -> None:
    with pytest.raises((InvalidRequest, Conflict)):
        await put(client, name, b"x")


async def test_zeros_become_holes(agent: Agent, client: GuestClient) -> None:
    data = b"begin" + bytes(8_000_000) + b"middle" + bytes(1_000_000)
    await put(client, "/sparse", data)
    made = agent.root / "sparse"
    assert made.read_bytes() == data
    assert made.stat().st_blocks * 512 < 200_000


async def test_a_tree_comes_back_as_it_is(agent: Agent, client: GuestClient) -> None:
    top = agent.root / "top"
    (top / "sub/deep").mkdir(parents=True)
    (top / "sub").chmod(0o700)
    (top / "empty").write_bytes(b"")
    (top / "sub/big").write_bytes(os.urandom(700_001))
    (top / "sub/link").symlink_to("../empty")
    (top / "bad\udcff name").write_bytes(b"odd")
    os.mkfifo(top / "fifo")
    os.utime(top / "empty", (5, 5))
    os.chown(top / "empty", 11, 12)
    entries = await get(client, "/top")
    assert entries[0][0].path == "top"
    by_path = {entry.path: (entry, data) for entry, data in entries}
    assert sorted(by_path) == sorted(
        ["top", "top/empty", "top/sub", "top/sub/deep", "top/sub/big", "top/sub/link", "top/bad\udcff name"]
    )
    assert by_path["top/sub/big"][1] == (top / "sub/big").read_bytes()
    empty = by_path["top/empty"][0]
    assert (empty.size, empty.mtime, empty.uid, empty.gid) == (0, 5, 11, 12)
    link = by_path["top/sub/link"][0]
    assert (link.kind, link.link_target) == (FileKind.SYMLINK, "../empty")
    assert by_path["top/sub"][0].mode == 0o700
    paths = [entry.path for entry, _ in entries]
    assert paths.index("top/sub") < paths.index("top/sub/deep"), "a directory comes before what is in it"


async def test_following_links(agent: Agent, client: GuestClient, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"outside")
    (agent.root / "top").mkdir()
    (agent.root / "file").write_bytes(b"content")
    (agent.root / "top/link").symlink_to("/file")
    (agent.root / "top/out").symlink_to(tmp_path / "secret")
    entries = {entry.path: (entry.kind, data) for entry, data in await get(client, "/top", follow_links=True)}
    assert entries["top/link"] == (FileKind.FILE, b"content")
    assert "top/out" not in entries, "a link that leads nowhere inside the guest is left out"
    single = await get(client, "/top/link")
    assert single[0][0].kind is FileKind.SYMLINK


async def test_a_link_to_its_own_directory_ends(agent: Agent, client: GuestClient) -> None:
    (agent.root / "top").mkdir()
    (agent.root / "top/again").symlink_to(".")
    with pytest.raises(HypemanError):
        await get(client, "/top", follow_links=True)


async def test_missing_and_odd_sources(agent: Agent, client: GuestClient) -> None:
    os.mkfifo(agent.root / "fifo")
    with pytest.raises(NotFound):
        await get(client, "/none")
    with pytest.raises(InvalidRequest):
        await get(client, "/fifo")


async def test_a_single_file_has_its_own_name(agent: Agent, client: GuestClient) -> None:
    (agent.root / "dir").mkdir()
    (agent.root / "dir/file").write_bytes(b"x" * 100_000)
    [(entry, data)] = await get(client, "/dir//file")
    assert (entry.path, data) == ("file", b"x" * 100_000)


async def test_big_files_need_no_memory(agent: Agent, client: GuestClient) -> None:
    """200 MB both ways; neither agent nor client holds more than its windows."""
    block = os.urandom(1_000_000)
    async with await client.copy_to(CopyToRequest(path="/big")) as copy:
        for _ in range(200):
            await copy.send(block)
        assert await copy.finish() == 200_000_000
    total = 0
    async with client.copy_from("/big") as tree:
        async for item in tree:
            total += 0 if isinstance(item, CopyEntry) else len(item)
    assert total == 200_000_000
    assert agent.memory < 4 * 1024 * 1024


async def test_giving_up_a_download(agent: Agent, client: GuestClient) -> None:
    (agent.root / "big").write_bytes(bytes(10_000_000))
    before = agent.descriptors
    for _ in range(20):
        async with client.copy_from("/big") as tree:
            async for _ in tree:
                break
    await wait_until(lambda: agent.descriptors == before)
    assert (await client.stat("/big")).size == 10_000_000
