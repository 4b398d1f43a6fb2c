"""Messages between host and guest, as Structs. PathInfo is also part of the HTTP API."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from hypeman.guest.fields import Fields, MalformedFields, Tag


class PathInfo(msgspec.Struct, frozen=True):
    """What exists at a path in the guest."""

    exists: bool
    is_dir: bool = False
    is_file: bool = False
    is_symlink: bool = False
    link_target: Annotated[str | None, Meta(description="Where a symlink leads, if it was not followed")] = None
    mode: Annotated[int, Meta(description="Permission bits")] = 0
    size: Annotated[int, Meta(description="Bytes")] = 0
    error: Annotated[str | None, Meta(description="Why it cannot be determined, other than absence")] = None


class Ready(msgspec.Struct, frozen=True):
    """The guest is set up and serving; the first event on every connection."""

    phases_ms: dict[str, int]
    """Boot phase → milliseconds from kernel start to the end of the phase, in order."""


class Started(msgspec.Struct, frozen=True):
    """The main process runs the image's program."""


class Exited(msgspec.Struct, frozen=True):
    """The main process has ended; the guest powers off as soon as this is acknowledged."""

    exit_code: int
    """As in a shell: 128 + signal if killed, 127 or 126 if it never ran."""
    signal: int = 0
    oom: bool = False
    """Killed because guest memory ran out."""


class Fatal(msgspec.Struct, frozen=True):
    """The guest could not be set up or its program could not be started; it powers off."""

    message: str


GuestEvent = Ready | Started | Exited | Fatal


class EventKind(enum.IntEnum):
    READY = 1
    STARTED = 2
    EXITED = 3
    FATAL = 4


class FileKind(enum.IntEnum):
    FILE = 1
    DIR = 2
    SYMLINK = 3
    OTHER = 4
    HARD_LINK = 5
    """Only into a guest; when copied out, each name is a separate file."""


class ExecRequest(msgspec.Struct, frozen=True):
    """A program to run alongside the main process."""

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    """"NAME=value", overriding the instance's variables."""
    cwd: str | None = None
    """None: the working directory of the instance's own program."""
    user: str = ""
    """Empty: root."""
    tty: bool = False
    rows: int = 0
    cols: int = 0
    timeout_seconds: float = 0.0
    """0: none. On expiry everything in the session is killed and the exit code is 124."""
    keep: bool = False
    """Keep it for a minute if the connection is lost, if the agent can."""
    main: bool = False
    """The program of an idle instance, which ends with it. It is kept as well."""


class CopyToRequest(msgspec.Struct, frozen=True):
    """One file, directory, symlink or hard link to create in the guest; parents are created (0755)."""

    path: str
    kind: FileKind = FileKind.FILE
    mode: int | None = None
    """Permission bits; None is 0644 for a file and 0755 for a directory."""
    uid: int | None = None
    gid: int | None = None
    mtime: int | None = None
    """Seconds since 1970."""
    link_target: str | None = None
    """Required for a symlink or hard link, else None; for a hard link a path in the guest."""


class CopyEntry(msgspec.Struct, frozen=True):
    """One entry of a tree copied from the guest; for a file ``size`` bytes of data follow."""

    path: str
    """Relative to the parent of the requested path: begins with the root's own name."""
    kind: FileKind
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link_target: str | None = None


class Metrics(msgspec.Struct, frozen=True):
    """Resource usage inside the guest."""

    memory_total: int
    memory_available: int
    load: tuple[float, float, float]
    uptime_seconds: float
    processes: int


def parse_event(payload: bytes) -> GuestEvent | None:
    """Parse an event frame's payload: u8 kind, fields. None for an unknown kind (newer agent)."""
    if not payload:
        raise MalformedFields("an empty event")
    fields = Fields(payload[1:])
    match payload[0]:
        case EventKind.READY:
            return Ready(dict(_parse_phase(phase) for phase in fields.all(Tag.PHASE)))
        case EventKind.STARTED:
            return Started()
        case EventKind.EXITED:
            return Exited(fields.u32(Tag.EXIT_CODE), fields.u32(Tag.SIGNAL), fields.flag(Tag.OOM))
        case EventKind.FATAL:
            return Fatal(fields.text(Tag.MESSAGE))
        case _:
            return None


def _parse_phase(data: bytes) -> tuple[str, int]:
    fields = Fields(data)
    return fields.text(Tag.PHASE_NAME), fields.u64(Tag.PHASE_MS)


def parse_path_info(data: bytes) -> PathInfo:
    """Parse the reply to a stat request."""
    fields = Fields(data)
    if not fields.flag(Tag.EXISTS):
        return PathInfo(exists=False)
    kind = fields.u8(Tag.KIND)
    return PathInfo(
        exists=True,
        is_dir=kind == FileKind.DIR,
        is_file=kind == FileKind.FILE,
        is_symlink=kind == FileKind.SYMLINK,
        link_target=fields.text(Tag.LINK_TARGET) or None,
        mode=fields.u32(Tag.MODE),
        size=fields.u64(Tag.SIZE),
    )


def parse_copy_entry(data: bytes) -> CopyEntry:
    """Parse one entry's header. Raises MalformedFields unless its path is safe to join to a directory."""
    fields = Fields(data)
    path = fields.text(Tag.PATH)
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise MalformedFields(f"entry path {path!r} leads elsewhere")
    try:
        kind = FileKind(fields.u8(Tag.KIND))
    except ValueError as error:
        raise MalformedFields(str(error)) from error
    return CopyEntry(
        path=path,
        kind=kind,
        mode=fields.u32(Tag.MODE) & 0o7777,
        uid=fields.u32(Tag.UID),
        gid=fields.u32(Tag.GID),
        size=fields.u64(Tag.SIZE),
        mtime=fields.i64(Tag.MTIME),
        link_target=fields.text(Tag.LINK_TARGET) if kind is FileKind.SYMLINK else None,
    )


def parse_metrics(data: bytes) -> Metrics:
    """Parse the reply to a metrics request."""
    fields = Fields(data)
    return Metrics(
        memory_total=fields.u64(Tag.MEMORY_TOTAL),
        memory_available=fields.u64(Tag.MEMORY_AVAILABLE),
        load=(fields.u32(Tag.LOAD_1) / 1000, fields.u32(Tag.LOAD_5) / 1000, fields.u32(Tag.LOAD_15) / 1000),
        uptime_seconds=fields.u64(Tag.UPTIME_MS) / 1000,
        processes=fields.u32(Tag.PROCESSES),
    )
