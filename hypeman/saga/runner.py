"""Carry out a plan, or take it back.

A plan is a tuple of steps; a step is plain data with ``do`` beside ``undo``. Plans are of two kinds:

    carry_out       all or nothing: when a step fails or we are cancelled, the begun steps are undone,
                    newest first, the failing one too, since it may have half happened
    carry_forward   only onwards: what must end (stop, delete) is tried again until it is done

What every step promises, and the tests hold it to:

- ``do`` may run again after it was done or half done (a crash comes between doing and noting).
- ``undo`` is content when there is nothing to undo, and may run twice.
- Both meet only what carries this plan's own names.

Undoing is shielded from cancellation and goes on past a failing undo: everything that can be taken
back is. What could not be is told by UndoFailed, and the caller keeps the intent for the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol, TypeVar

import trio

from hypeman.errors import InternalError

log = logging.getLogger(__name__)

World_contra = TypeVar("World_contra", contravariant=True)

_FORWARD_TRIES = 3
_FORWARD_PAUSE = 0.2


class Step(Protocol[World_contra]):
    """One change of the world, and its reverse."""

    async def do(self, world: World_contra) -> None: ...
    async def undo(self, world: World_contra) -> None: ...


class UndoFailed(InternalError):
    """Some steps could not be taken back; the intent stays for the next start."""


async def carry_out(steps: Sequence[Step[World_contra]], world: World_contra) -> None:
    """Do all steps in order, or raise what went wrong with all begun ones undone.

    Raises UndoFailed instead, with the first failure as its cause, if the undoing failed as well.
    """
    begun = 0
    try:
        for step in steps:
            begun += 1
            await step.do(world)
    except BaseException as error:
        try:
            await take_back(steps[:begun], world)
        except UndoFailed as failure:
            raise failure from error
        raise


async def take_back(steps: Sequence[Step[World_contra]], world: World_contra) -> None:
    """Undo ``steps``, newest first, going on past failures. Raises UndoFailed if there were any."""
    failed: list[str] = []
    with trio.CancelScope(shield=True):
        for step in reversed(steps):
            try:
                await step.undo(world)
            except Exception as error:
                log.exception("can not undo %s", type(step).__name__)
                failed.append(f"{type(step).__name__}: {error}")
    if failed:
        raise UndoFailed("could not take back " + "; ".join(failed))


async def carry_forward(steps: Sequence[Step[World_contra]], world: World_contra) -> None:
    """Do all steps, each tried a few times. Raises what the last try of a step raised.

    Cancelled, it leaves the rest undone: the intent is still stored and the next start goes on.
    """
    for step in steps:
        for attempt in range(1, _FORWARD_TRIES + 1):
            try:
                await step.do(world)
                break
            except Exception:
                if attempt == _FORWARD_TRIES:
                    raise
                log.warning("step %s failed, trying again", type(step).__name__, exc_info=True)
                await trio.sleep(_FORWARD_PAUSE * attempt)
