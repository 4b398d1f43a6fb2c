"""Forms as they arrive, and the events of builds."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from hypeman.errors import InvalidRequest
from hypeman.server.multipart import MAX_PARTS, read_form
from tests.fakes.services import FakeWorld

KIND = "multipart/form-data; boundary=b-1"


def form(**fields: bytes) -> bytes:
    parts = [
        b'--b-1\r\nContent-Disposition: form-data; name="%b"; filename="f"\r\n\r\n%b\r\n' % (name.encode(), value)
        for name, value in fields.items()
    ]
    return b"".join(parts) + b"--b-1--\r\n"


async def read(data: bytes, kind: str | None = KIND, size: int = 7) -> dict[str, bytes]:
    async def chunks() -> AsyncGenerator[bytes]:
        for at in range(0, len(data), size):
            yield data[at : at + size]

    found: dict[str, bytes] = {}
    async with aclosing(chunks()) as body, aclosing(read_form(body, kind)) as pieces:
        async for name, piece in pieces:
            found[name] = found.get(name, b"") + piece
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100_000])
async def test_fields_in_pieces(size: int) -> None:
    wanted = {"source": b"\x1f\x8b\r\n--b-\r\n\r\r\n" * 20, "empty": b"", "tags": b'{"a":"b"}'}
    assert await read(form(**wanted), size=size) == wanted


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(a=b"1"), None),
        (form(a=b"1"), "application/json"),
        (form(a=b"1"), "multipart/form-data"),
        (form(a=b"1")[:-8], KIND),
        (b"", KIND),
        (b"--b-1\r\nContent-Type: text/plain\r\n\r\nx\r\n--b-1--\r\n", KIND),
        (b"--b-1\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b-1--\r\n", KIND),
        (b'--b-1\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b-1--\r\n', KIND),
        (b"--b-1\r\nContent-Disposition: form-data; name*=undefined''x\r\n\r\nx\r\n--b-1--\r\n", KIND),
        (b"--b-1\r\nContent-Disposition: form-data; x*" + b"9" * 5000 + b"=y\r\n\r\nx\r\n--b-1--\r\n", KIND),
        (b"--b-1\r\n" + b"X: y\r\n" * 100_000, KIND),
        (b"--b-1x\r\n", KIND),
        (b"x" * 600_000, KIND),
        (form(**{f"f{number}": b"" for number in range(MAX_PARTS + 1)}), KIND),
    ],
)
async def test_what_is_no_form(body: bytes, kind: str | None) -> None:
    with pytest.raises(InvalidRequest):
        await read(body, kind, size=64 << 10)


async def test_a_name_among_other_parameters() -> None:
    head = rb'form-data; filename="a\"; name=b\\"; ; Name="c\"d"; name=e'
    body = b"--b-1\r\nContent-Disposition: " + head + b"\r\n\r\nx\r\n--b-1--\r\n"
    assert await read(body, 'multipart/form-data; charset=utf-8; Boundary="b-1"') == {'c"d': b"x"}


async def test_a_build_over_http(ask: Any, world: FakeWorld) -> None:
    body = form(source=b"\x1f\x8b" * 1000, image_name=b"team/app:v1")
    made = await ask("POST", "/builds", data=body, headers={"Content-Type": KIND})
    assert made.status_code == 202
    assert world.builds.fields == {"source": b"\x1f\x8b" * 1000, "image_name": b"team/app:v1"}
    build = await made.get_json()
    for field in ("queue_position", "image_digest", "error", "started_at", "builder_id"):
        assert field in build, "nullable fields are always there"
    events = await ask("GET", f"/builds/{build['id']}/events?follow=true")
    assert events.content_type.startswith("text/event-stream")
    text = (await events.get_data(as_text=True)).splitlines()
    assert text[0].startswith('data: {"type":"log","timestamp":') and '"status":"ready"' in text[2]
    refused = await ask("POST", "/builds", data=b"{}", headers={"Content-Type": "application/json"})
    assert refused.status_code == 400


async def test_a_boundary_may_be_cut_anywhere() -> None:
    for value in (b"", b"\r", b"x\r\n", b"\r\n--b-", b"\r\n--b", b"--b-1", b"a\r\r\n--b-\r\n"):
        for size in range(1, 40):
            assert await read(form(a=value, b=b"1"), size=size) == {"a": value, "b": b"1"}, (value, size)
    padded = b'preamble\r\n--b-1 \t\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n--b-1--\r\nepilogue'
    assert await read(padded) == {"a": b"1"}
