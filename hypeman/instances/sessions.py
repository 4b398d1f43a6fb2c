"""Adapts the guest agent's protocol to the streams of the contract (§3.1, §3.2).

The contract merges stdout and stderr, sends the exit code last, marks the last entry of a copy, and
treats mode 0 and owner 0:0 of a copy as not given.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from hypeman.errors import InvalidRequest
from hypeman.guest import client as guest
from hypeman.guest import types as wire
from hypeman.guest.client import GuestClient
from hypeman.guest.types import FileKind
from hypeman.instances.session_types import CopyEntry, CpRequest, EntryEnd, ExecRequest

_DEFAULT_COMMAND = ("/bin/sh",)
_LINKS = {"link": FileKind.SYMLINK, "hardlink": FileKind.HARD_LINK}


class ExecSession:
    """A program in the guest. ``receive`` returns its output and finally its exit code."""

    def __init__(self, session: guest.ExecSession) -> None:
        self._session = session
        self._result: guest.ExecResult | None = None

    async def send_stdin(self, data: bytes) -> None:
        await self._session.send_stdin(data)

    async def close_stdin(self) -> None:
        await self._session.close_stdin()

    async def resize(self, rows: int, cols: int) -> None:
        await self._session.resize(min(rows, 65535), min(cols, 65535))

    async def receive(self) -> bytes | int:
        """Output as it arrives, the exit code last. If a program could not be started, the reason is output too."""
        if self._result is None:
            match await self._session.receive():
                case guest.Output(data=data):
                    return data
                case guest.ExecResult() as result:
                    self._result = result
                    if result.message:
                        return f"Error: {result.message}\r\n".encode()
        assert self._result is not None
        return self._result.exit_code

    async def aclose(self) -> None:
        await self._session.aclose()


class CopyOut:
    """A file or tree being copied out: for each entry its header, its bytes, its end."""

    def __init__(self, client: GuestClient, request: CpRequest) -> None:
        self._client = client
        self._request = request
        self._stack = AsyncExitStack()
        self._items = self._iterate()

    def __aiter__(self) -> AsyncIterator[CopyEntry | bytes | EntryEnd]:
        return self

    async def __anext__(self) -> CopyEntry | bytes | EntryEnd:
        return await self._items.__anext__()

    async def aclose(self) -> None:
        await self._items.aclose()  # type: ignore[attr-defined]  # it is an async generator
        await self._stack.aclose()

    async def _iterate(self) -> AsyncIterator[CopyEntry | bytes | EntryEnd]:
        """An entry's end is emitted when the next one begins, since only then is it known whether it is the last."""
        copying = self._client.copy_from(self._request.guest_path, follow_links=self._request.follow_links)
        items = await self._stack.enter_async_context(copying)
        begun = False
        async for item in items:
            if isinstance(item, bytes):
                yield item
                continue
            if begun:
                yield EntryEnd(final=False)
            begun = True
            yield _entry(item)
        if begun:
            yield EntryEnd(final=True)


async def open_exec(client: GuestClient, request: ExecRequest) -> ExecSession:
    return ExecSession(
        await client.exec(
            wire.ExecRequest(
                argv=request.command or _DEFAULT_COMMAND,
                env=tuple(f"{key}={value}" for key, value in request.env.items()),
                cwd=request.cwd or None,
                tty=request.tty,
                rows=request.rows,
                cols=request.cols,
                timeout_seconds=float(request.timeout),
            )
        )
    )


async def open_copy_to(client: GuestClient, request: CpRequest) -> guest.CopyIn:
    owned = bool(request.uid or request.gid)
    kind = _LINKS.get(request.direction) or (FileKind.DIR if request.is_dir else FileKind.FILE)
    linked = kind in _LINKS.values()
    if linked and (not request.link_target or "\0" in request.link_target):
        raise InvalidRequest("link_target must say where the link is to lead")
    return await client.copy_to(
        wire.CopyToRequest(
            path=request.guest_path,
            kind=kind,
            mode=request.mode & 0o7777 or None,
            uid=request.uid if owned else None,
            gid=request.gid if owned else None,
            mtime=request.mtime,
            link_target=request.link_target if linked else None,
        )
    )


def _entry(entry: wire.CopyEntry) -> CopyEntry:
    return CopyEntry(
        path=entry.path,
        mode=entry.mode,
        is_dir=entry.kind is FileKind.DIR,
        is_symlink=entry.kind is FileKind.SYMLINK,
        link_target=entry.link_target or "",
        size=entry.size if entry.kind is FileKind.FILE else 0,
        mtime=entry.mtime,
        uid=entry.uid,
        gid=entry.gid,
    )
