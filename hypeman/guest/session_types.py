"""The first messages of the exec and cp streams of the API (contract §3.1, §3.2); ``sessions.py`` converts them to
requests to the agent, which are in ``types.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from hypeman.fields import MAX_INT, Count

Uint32 = Annotated[int, Meta(ge=0, lt=2**32)]


class ExecResumption(Struct, frozen=True, kw_only=True):
    """Which program a client resumes after its connection was lost."""

    session: Annotated[
        str,
        Meta(
            pattern="^([0-9a-f]{32}|main)$",
            description="As the server's first message said; `main`: the program of an idle instance",
        ),
    ]
    received: Annotated[
        Annotated[int, Meta(ge=0, lt=2**62)] | None,
        Meta(
            description="Bytes of output that the client has; null: it wants what follows, and the server's first "
            "message has `output`, the number of bytes before that"
        ),
    ] = 0


class ExecRequest(Struct, frozen=True, kw_only=True):
    """A program to run in the guest."""

    command: Annotated[tuple[str, ...], Meta(description="Default: /bin/sh")] = ()
    tty: bool = False
    env: dict[str, str] = {}
    cwd: str | None = None
    user: Annotated[
        str, Meta(description="Extension. As in `user` of an instance; default: root, and in an idle instance its user")
    ] = ""
    timeout: Annotated[Count, Meta(description="Seconds; 0: none. Exit code 124 when it is over")] = 0
    wait_for_agent: Annotated[Count, Meta(description="Seconds to wait for the guest agent")] = 0
    rows: Count = 0
    cols: Count = 0
    keep: Annotated[
        bool,
        Meta(
            description="Extension. The program runs on for a minute if the connection is lost, and can be resumed "
            "from there: the server's first message is `{\"session\": KEY}` if the guest's agent can do that"
        ),
    ] = False
    main: Annotated[
        bool,
        Meta(
            description="Extension. This is the program of an idle instance: it is kept, its output is also in the "
            'log, and when it ends, the instance ends, with its exit code. A client that sends `{"leave": true}` '
            "leaves it running, and `resume` comes back to it"
        ),
    ] = False
    resume: Annotated[ExecResumption | None, Meta(description="Extension. Instead of a command")] = None
    separate: Annotated[
        bool,
        Meta(
            description="Extension. The first byte of each binary message to the client says what follows: 1 standard "
            "output, 2 standard error. Not with `keep`"
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.separate and (self.keep or self.main):
            raise ValueError("separate and keep exclude each other; so do separate and main")


class CpRequest(Struct, frozen=True, kw_only=True):
    """One file, directory or link into the guest, or one tree out of it."""

    direction: Annotated[
        Literal["to", "from", "link", "hardlink"],
        Meta(
            description="`link` and `hardlink` are ours: `to`, but for a symlink, and for one more name of a file that "
            "is there (`mode`, owner and `mtime` are that file's). A server that does not know them says so"
        ),
    ]
    guest_path: str
    is_dir: bool = False
    mode: Annotated[Uint32, Meta(description="Permission bits; 0: 0644 for a file, 0755 for a directory")] = 0
    uid: Uint32 = 0
    gid: Uint32 = 0
    follow_links: bool = False
    src_basename: str | None = None
    link_target: Annotated[str, Meta(description="Where a link is to lead; any path of the guest")] = ""
    mtime: Annotated[
        Annotated[int, Meta(ge=-MAX_INT, le=MAX_INT)] | None, Meta(description="Seconds since 1970; null: now")
    ] = None
