"""Which command is legal in which state: the whole table.

A command is queued in the instance's task and checked when it is dequeued, so concurrent commands
are serialized. A refusal names the state and the commands that would be legal.

    state          start  stop  standby  restore  fork  capture  exec/cp/stat  attach/detach  delete
    Created                x                                                                    x
    Initializing           x                                                                    x
    Running                x      x                 x*     x          x             x           x
    Paused                 x                                                                    x
    Shutdown               x                                                                    x
    Stopped          x                              x      x                        x           x
    Standby                                x        x      x                                    x
    Unknown                x                                                                    x

    x*  a running source only with ``from_running``
"""

from __future__ import annotations

import enum

from hypeman.errors import InvalidState
from hypeman.instances.model.states import NO_VMM
from hypeman.instances.model.types import InstanceState as S


class Command(enum.StrEnum):
    START = "start"
    STOP = "stop"
    STANDBY = "standby"
    RESTORE = "restore"
    FORK = "fork"
    SNAPSHOT = "snapshot"
    ATTACH = "attach"
    DETACH = "detach"
    USE = "use"
    """exec, cp, stat."""
    RESTORE_SNAPSHOT = "restore-snapshot"
    DELETE = "delete"


_ALIVE = frozenset(S) - NO_VMM

ALLOWED: dict[Command, frozenset[S]] = {
    Command.START: frozenset({S.STOPPED}),
    Command.STOP: _ALIVE,
    Command.STANDBY: frozenset({S.RUNNING}),
    Command.RESTORE: frozenset({S.STANDBY}),
    Command.FORK: frozenset({S.RUNNING, S.STOPPED, S.STANDBY}),
    Command.SNAPSHOT: frozenset({S.RUNNING, S.STOPPED, S.STANDBY}),
    Command.ATTACH: frozenset({S.RUNNING, S.STOPPED}),
    Command.DETACH: frozenset({S.RUNNING, S.STOPPED}),
    Command.USE: frozenset({S.RUNNING}),
    Command.RESTORE_SNAPSHOT: frozenset({S.STOPPED, S.STANDBY}),
    Command.DELETE: frozenset(S),
}

_REMEDY: dict[S, str] = {
    S.CREATED: "wait for it to run, or stop it",
    S.INITIALIZING: "wait for it to run, or stop it",
    S.RUNNING: "stop it or put it in standby first",
    S.PAUSED: "stop it first",
    S.SHUTDOWN: "wait until it has stopped",
    S.STOPPED: "start it first",
    S.STANDBY: "restore it first",
    S.UNKNOWN: "stop or delete it",
}


def check_legal(command: Command, state: S, *, name: str) -> None:
    """Raise InvalidState unless ``command`` is legal in ``state``."""
    if state not in ALLOWED[command]:
        wanted = " or ".join(sorted(s.value for s in ALLOWED[command]))
        raise InvalidState(
            f"cannot {command.value} instance {name!r} in state {state.value}; it must be {wanted}: {_REMEDY[state]}"
        )
