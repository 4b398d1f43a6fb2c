"""Opens exec and copy sessions for the API's requests (contract §3.1, §3.2).

The contract treats mode 0 and owner 0:0 of a copy as not given.
"""

from __future__ import annotations

from hypeman.errors import InvalidRequest
from hypeman.guest import types as wire
from hypeman.guest.client import GuestClient
from hypeman.guest.copies import CopyIn, CopyOut
from hypeman.guest.programs import ExecSession
from hypeman.guest.protocol import MAIN_KEY
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import FileKind

_MAIN = "main"
_DEFAULT_COMMAND = ("/bin/sh",)
_LINKS = {"link": FileKind.SYMLINK, "hardlink": FileKind.HARD_LINK}


async def open_exec(client: GuestClient, request: ExecRequest) -> ExecSession:
    if request.resume is not None:
        session = request.resume.session
        key = MAIN_KEY if session == _MAIN else bytes.fromhex(session)
        return await client.resume(key, request.resume.received)
    return await client.exec(
        wire.ExecRequest(
            argv=request.command or _DEFAULT_COMMAND,
            env=tuple(f"{key}={value}" for key, value in request.env.items()),
            cwd=request.cwd or None,
            user=request.user,
            tty=request.tty,
            rows=request.rows,
            cols=request.cols,
            timeout_seconds=float(request.timeout),
            keep=request.keep,
            main=request.main,
        )
    )


async def open_copy_to(client: GuestClient, request: CpRequest) -> CopyIn:
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


async def open_copy_from(client: GuestClient, request: CpRequest) -> CopyOut:
    copy = client.copy_from(request.guest_path, follow_links=request.follow_links)
    await copy.open()
    return copy
