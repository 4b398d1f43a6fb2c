"""The bundle's file: what was signed comes out, and nothing else does."""

from __future__ import annotations

import io
import subprocess
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from hypeman.bundle.format import (
    MANIFEST,
    SIGNATURE,
    BadBundle,
    BadSignature,
    File,
    Kind,
    Manifest,
    check_file,
    describe,
    read_files,
    read_manifest,
    write,
)
from hypeman.bundle.minisign import new_key, parse_public_key, parse_secret_key, sign, verify
from hypeman.errors import InvalidRequest

KEY = new_key()
TRUSTED = (KEY.public,)


def manifest_of(*files: File) -> Manifest:
    return Manifest(
        format=1,
        name="edge",
        version="1.0",
        architecture="amd64",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        files=files,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Three small files, one of them empty, one exactly a block long."""
    sources = []
    files = []
    for kind, size in ((Kind.APPLIANCE, 700), (Kind.CONFIG, 0), (Kind.IMAGE, 512)):
        path = tmp_path / f"{kind}.bin"
        path.write_bytes(bytes(n % 251 for n in range(size)))
        sources.append(path)
        files.append(describe(path, kind, reference="a/b:1" if kind is Kind.IMAGE else ""))
    target = tmp_path / "x.hypeman"
    with target.open("wb") as out:
        write(out, manifest_of(*files), sources, KEY)
    return target


def read(data: bytes, trusted: tuple[object, ...] = TRUSTED) -> dict[str, bytes]:
    got: dict[str, bytearray] = {}
    source = io.BytesIO(data)
    verified = read_manifest(source, trusted)  # type: ignore[arg-type]
    read_files(source, verified.manifest, lambda file: got.setdefault(file.name, bytearray()).extend)
    return {name: bytes(content) for name, content in got.items()}


def test_what_was_written_is_read(bundle: Path, tmp_path: Path) -> None:
    got = read(bundle.read_bytes())
    assert {name: len(data) for name, data in got.items()} == {
        "appliance/appliance.bin": 700, "config/config.bin": 0, "image/image.bin": 512,
    }  # fmt: skip
    verified = check_file(bundle, TRUSTED)
    assert verified.comment == "hypeman bundle edge 1.0 amd64" and verified.key == KEY.public
    with tarfile.open(bundle) as tar:
        assert tar.getnames() == [MANIFEST, SIGNATURE, *got]


def test_every_altered_byte_is_refused(bundle: Path) -> None:
    """Headers, signature, manifest, contents, padding and end: at no place does a bit go unnoticed."""
    data = bytearray(bundle.read_bytes())
    for place in range(len(data)):
        data[place] ^= 1
        with pytest.raises((BadBundle, BadSignature)):
            read(bytes(data))
        data[place] ^= 1
    assert read(bytes(data))


def test_every_cut_and_every_addition_is_refused(bundle: Path) -> None:
    data = bundle.read_bytes()
    for end in range(0, len(data), 37):
        with pytest.raises(BadBundle):
            read(data[:end])
    for more in (b"\0", bytes(512), data):
        with pytest.raises(BadBundle, match="end"):
            read(data + more)


def test_another_key_is_refused_by_name(bundle: Path) -> None:
    other = new_key().public
    with pytest.raises(BadSignature, match=f"{KEY.public}.*not trusted.*{other}"):
        read(bundle.read_bytes(), (other,))
    with pytest.raises(BadSignature, match="trusted: none"):
        read(bundle.read_bytes(), ())
    forged = msgspec.structs.replace(other, key_id=KEY.key_id)
    with pytest.raises(BadSignature, match="invalid"):
        read(bundle.read_bytes(), (forged,))


def test_nothing_is_received_before_the_signature_is_known(bundle: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[600] ^= 1  # in the manifest
    with pytest.raises(BadSignature):
        read_manifest(io.BytesIO(bytes(data)), TRUSTED)


@pytest.mark.parametrize(
    "name", ["appliance/../x", "appliance//x", "/appliance/x", "appliance/.x", "x", "appliance/a/b"]
)
def test_a_signed_manifest_cannot_name_other_places(name: str, bundle: Path) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": name, "kind": "appliance", "size": 1, "sha256": "0" * 64}, File)


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    file = describe(path, Kind.APPLIANCE)
    for content in (b"two", b"on", b""):
        path.write_bytes(content)
        with pytest.raises(BadBundle, match="changed"):
            write(io.BytesIO(), manifest_of(file), [path], KEY)


def test_manifests_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    appliance, config = describe(path, Kind.APPLIANCE), describe(path, Kind.CONFIG)
    for files in (
        (config,),
        (appliance, appliance),
        (appliance, describe(path, Kind.IMAGE)),
        (appliance, msgspec.structs.replace(config, kind=Kind.VMM)),
    ):
        with pytest.raises(BadBundle):
            write(io.BytesIO(), manifest_of(*files), [path] * len(files), KEY)


def test_keys_read_back() -> None:
    assert parse_secret_key(KEY.render()) == KEY
    assert parse_public_key(KEY.public.render()) == KEY.public
    assert parse_public_key(KEY.public.render().splitlines()[1]) == KEY.public
    for text in (b"", b"x", KEY.render()[:-9], KEY.public.render()):
        with pytest.raises(InvalidRequest):
            parse_secret_key(text)
    with pytest.raises(InvalidRequest):
        parse_public_key(KEY.render())
    assert KEY.seed.hex() not in repr(KEY)


def minisign(*words: str | Path) -> str:
    result = subprocess.run(["minisign", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_minisign_accepts_ours_and_we_accept_minisigns(tmp_path: Path, bundle: Path) -> None:
    """In both directions, with keys of both."""
    (tmp_path / "our.pub").write_bytes(KEY.public.render())
    subprocess.run(["tar", "-xf", bundle, MANIFEST, SIGNATURE], cwd=tmp_path, check=True)
    assert "hypeman bundle edge" in minisign("-V", "-p", tmp_path / "our.pub", "-m", tmp_path / MANIFEST)

    minisign("-G", "-W", "-p", tmp_path / "their.pub", "-s", tmp_path / "their.key")
    theirs = parse_secret_key((tmp_path / "their.key").read_bytes())
    assert parse_public_key((tmp_path / "their.pub").read_bytes()) == theirs.public
    message = tmp_path / "message"
    message.write_bytes(b"a message")
    minisign("-S", "-s", tmp_path / "their.key", "-t", "a comment", "-m", message)
    signed = (tmp_path / "message.minisig").read_bytes()
    assert verify(b"a message", signed, [theirs.public]) == (theirs.public, "a comment")
    (tmp_path / "our.key").write_bytes(KEY.render())
    minisign("-S", "-s", tmp_path / "our.key", "-m", message)
    message.with_suffix(".minisig").write_bytes(sign(b"a message", theirs, comment="x"))
    minisign("-V", "-p", tmp_path / "their.pub", "-m", message)
