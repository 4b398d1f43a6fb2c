"""The states of an instance and the transitions between them: the whole table. Pure.

A command or an event changes the state only along these transitions; the crash matrix of the tests checks each change.
The diagram in ../README.md is drawn from this table: ``python -m tests.instances.test_states`` writes it.
"""

from __future__ import annotations

from typing import NamedTuple

from hypeman.instances.model.types import InstanceState as S

NO_VMM = frozenset({S.STOPPED, S.STANDBY})
"""States without a VMM."""

SETTLED = frozenset({S.STOPPED, S.STANDBY, S.UNKNOWN})
"""States that are left only by a command, or when an Unknown instance can be determined."""


class Transition(NamedTuple):
    before: S | None
    """None: the instance is new."""
    after: S | None
    """None: the instance is gone."""
    cause: str


TRANSITIONS: tuple[Transition, ...] = (
    Transition(None, S.CREATED, "create"),
    Transition(None, S.STOPPED, "fork"),
    Transition(None, S.STANDBY, "fork with memory"),
    Transition(None, S.RUNNING, "fork from a pool"),
    Transition(S.CREATED, S.INITIALIZING, "VMM runs"),
    Transition(S.INITIALIZING, S.RUNNING, "workload started"),
    Transition(S.INITIALIZING, S.SHUTDOWN, "workload ended"),
    Transition(S.INITIALIZING, S.STOPPED, "stop, or the VMM ended"),
    Transition(S.RUNNING, S.SHUTDOWN, "workload ended"),
    Transition(S.RUNNING, S.STOPPED, "stop, the VMM ended, or the guest could not be awakened"),
    Transition(S.RUNNING, S.STANDBY, "standby"),
    Transition(S.SHUTDOWN, S.STOPPED, "VMM ended"),
    Transition(S.STANDBY, S.RUNNING, "restore"),
    Transition(S.STANDBY, S.STOPPED, "back to a snapshot without memory"),
    Transition(S.STOPPED, S.INITIALIZING, "start"),
    Transition(S.STOPPED, S.STANDBY, "back to a snapshot with memory"),
    *(
        Transition(state, S.UNKNOWN, "neither done nor undone")
        for state in (S.CREATED, S.INITIALIZING, S.RUNNING, S.SHUTDOWN, S.STOPPED, S.STANDBY)
    ),
    *(
        Transition(S.UNKNOWN, state, "settled")
        for state in (S.INITIALIZING, S.RUNNING, S.SHUTDOWN, S.STOPPED, S.STANDBY)
    ),
    Transition(S.CREATED, None, "create failed, or delete"),
    *(
        Transition(state, None, "delete")
        for state in (S.INITIALIZING, S.RUNNING, S.SHUTDOWN, S.STOPPED, S.STANDBY, S.UNKNOWN)
    ),
)
"""Nothing leaves an instance Paused: a VM is paused only while an operation works on it."""

_POSSIBLE = frozenset((transition.before, transition.after) for transition in TRANSITIONS)


def is_possible(before: S | None, after: S | None) -> bool:
    """Whether an instance may go from ``before`` to ``after``, or stay as it is."""
    return before is after or (before, after) in _POSSIBLE


def render_diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for before, after, cause in TRANSITIONS:
        lines.append(f"  {before.value if before else '[*]'} --> {after.value if after else '[*]'}: {cause}")
    return "\n".join(lines)
