"""The tar reader against Python's own writer, and against anything at all."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypeman.images.tar import Entry, Kind, Source, TarError, TarReader
from tests.images.layout import directory, entry, hard_link, symlink, tar


def read(data: bytes, *, step: int = 1000, limit: int = 1 << 30, max_entries: int = 1000) -> list[tuple[Entry, bytes]]:
    source = Source(iter([data[at : at + step] for at in range(0, len(data), step)]), limit=limit)
    reader = TarReader(source, max_entries=max_entries)
    found = []
    while (member := reader.next_entry()) is not None:
        found.append((member, reader.data(member.stored)))
    return found


CHARACTERS = st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])
NAMES = st.text(CHARACTERS, min_size=1, max_size=180).filter(lambda name: name.strip("/"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda name, data, mode, uid, mtime: entry(
                name.rstrip("/"), data=data, mode=mode, uid=uid, gid=uid // 2, mtime=mtime
            ),
            NAMES,
            st.binary(max_size=1500),
            st.integers(0, 0o7777),
            st.integers(0, 2**32 - 1),
            st.integers(-(2**40), 2**40),
        ),
        max_size=4,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.integers(1, 2000),
)
def test_what_python_writes(entries: list[tuple[tarfile.TarInfo, bytes]], format: int, step: int) -> None:  # noqa: A002
    """Names, numbers, times and data come back, however the stream is cut into chunks."""
    found = read(tar(*entries, format=format), step=step)
    assert [
        (member.name, member.mode, member.uid, member.gid, member.mtime, data, member.kind) for member, data in found
    ] == [
        (info.name.encode("utf-8"), info.mode, info.uid, info.gid, info.mtime, data, Kind.FILE)
        for info, data in entries
    ]


def test_kinds() -> None:
    archive = tar(
        directory("d"), symlink("s", "t"), hard_link("h", "d/x"), entry("f", tarfile.FIFOTYPE),
        entry("c", tarfile.CHRTYPE, devmajor=4, devminor=5), entry("b", tarfile.BLKTYPE), entry("v", tarfile.AREGTYPE),
        entry("contiguous", tarfile.CONTTYPE),
    )  # fmt: skip
    kinds = [member.kind for member, _ in read(archive)]
    assert kinds == [
        Kind.DIRECTORY, Kind.SYMLINK, Kind.HARD_LINK, Kind.FIFO, Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE,
        Kind.FILE, Kind.FILE,
    ]  # fmt: skip
    assert read(archive)[4][0].device == (4, 5)


def test_xattrs_of_both_conventions() -> None:
    info, data = entry("x", data=b"1")
    info.pax_headers = {"SCHILY.xattr.user.a": "1=2", "LIBARCHIVE.xattr.user%2Eb": "YmI", "SCHILY.xattr.user.none": ""}
    assert read(tar((info, data)))[0][0].xattrs == {b"user.a": b"1=2", b"user.b": b"bb"}


def test_global_headers_change_nothing() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"comment": "git", "path": "elsewhere"}) as archive:
        archive.addfile(tarfile.TarInfo("x"))
    assert [member.name for member, _ in read(out.getvalue())] == [b"x"]


def test_without_end_marks() -> None:
    """Some builders leave out the two empty blocks; others put gigabytes behind them, which count."""
    archive = tar(entry("x", data=b"1"))
    assert len(read(archive[:1024])) == 1
    with pytest.raises(TarError, match="more than the 5000"):
        read(archive[:1024] + bytes(8000), limit=5000)


def test_data_not_read_is_skipped() -> None:
    reader = TarReader(Source(iter([tar(entry("a", data=b"x" * 3000), entry("b", data=b"y"))])))
    first = reader.next_entry()
    assert first is not None and reader.data(10) == b"x" * 10
    second = reader.next_entry()
    assert second is not None and second.name == b"b" and reader.data(1) == b"y"
    with pytest.raises(TarError, match="less data"):
        reader.data(1)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"GNU.sparse.map": "0,10,5,10", "GNU.sparse.size": "20"}, "overlap"),
        ({"GNU.sparse.map": "0,10", "GNU.sparse.size": "5"}, "does not fit"),
        ({"GNU.sparse.map": "0,99", "GNU.sparse.size": "500"}, "does not fit"),
        ({"GNU.sparse.map": "0", "GNU.sparse.size": "5"}, "damaged map"),
        ({"GNU.sparse.map": "a,b", "GNU.sparse.size": "5"}, "damaged number"),
        ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}, "damaged number|less data"),
        ({"GNU.sparse.realsize": str(1 << 63)}, "does not fit|damaged"),
        ({"size": "-1"}, "damaged number"),
        ({"size": "9" * 30}, "damaged number"),
        ({"uid": str(1 << 32)}, "out of range"),
        ({"mtime": "soon"}, "damaged number"),
        ({"path": "a\0b"}, "zero byte"),
        ({"LIBARCHIVE.xattr.user.x": "?"}, "not base64"),
    ],
)
def test_bad_records(records: dict[str, str], reason: str) -> None:
    info, data = entry("x", data=b"0123456789")
    info.pax_headers = records
    with pytest.raises(TarError, match=reason):
        read(tar((info, data)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_archives(data: st.DataObject) -> None:
    """Bytes changed anywhere give entries or a TarError, never anything else, and never more than was there."""
    good = bytearray(tar(entry("a" * 150, data=b"x" * 700, xattrs={"user.a": "b"}), symlink("l", "t" * 120)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        found = read(bytes(good[:cut]))
    except TarError:
        return
    assert sum(len(content) for _, content in found) <= len(good)
