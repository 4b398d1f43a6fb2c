"""Carry out a plan, or undo it.

A plan is a tuple of steps; a step is plain data, and Effects do and undo it. There are two ways to run a plan:

    carry_out       all or nothing: on failure or cancellation all started steps are undone, newest
                    first, including the failed one, since it may be partly done
    carry_forward   roll forward only: for operations that must complete (stop, delete), with retries

Every step guarantees, and the tests verify:

- it may be done again after it was done or partly done (a crash before the result was recorded).
- its undo is idempotent and a no-op if nothing was done.
- both touch only resources that carry this plan's own names.

Undoing is shielded from cancellation and continues after a failed undo: everything that can be undone
is. UndoFailed reports the rest, and the caller keeps the intent for the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol, TypeVar

import trio

from hypeman.errors import InternalError

log = logging.getLogger(__name__)

S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)

_FORWARD_TRIES = 3
_FORWARD_PAUSE = 0.2


class Does(Protocol[S_contra]):
    """What changes the system, one step at a time."""

    async def do(self, step: S_contra) -> None: ...


class Undoes(Protocol[S_contra]):
    """What reverses the change."""

    async def undo(self, step: S_contra) -> None: ...


class Effects(Does[S_contra], Undoes[S_contra], Protocol[S_contra]):
    """Both, for steps that can be undone."""


class UndoFailed(InternalError):
    """Some steps could not be undone; the intent is kept for the next start."""


async def carry_out(steps: Sequence[S], effects: Effects[S]) -> None:
    """Do all steps in order. On failure undo all started ones and raise the error.

    Raises UndoFailed instead, with the first failure as its cause, if undoing failed as well.
    """
    begun = 0
    try:
        for step in steps:
            begun += 1
            await effects.do(step)
    except BaseException as error:
        try:
            await take_back(steps[:begun], effects)
        except UndoFailed as failure:
            raise failure from error
        raise


async def take_back(steps: Sequence[S], effects: Undoes[S]) -> None:
    """Undo ``steps``, newest first, continuing after failures. Raises UndoFailed if there were any."""
    failed: list[str] = []
    with trio.CancelScope(shield=True):
        for step in reversed(steps):
            try:
                await effects.undo(step)
            except Exception as error:
                log.exception("cannot undo %s", type(step).__name__)
                failed.append(f"{type(step).__name__}: {error}")
    if failed:
        raise UndoFailed("could not undo " + "; ".join(failed))


async def carry_forward(steps: Sequence[S], effects: Does[S]) -> None:
    """Do all steps, retrying each a few times. Raises the error of a step's last attempt.

    If cancelled, the remaining steps are not done: the intent is still stored and the next start continues.
    """
    for step in steps:
        for attempt in range(1, _FORWARD_TRIES + 1):
            try:
                await effects.do(step)
                break
            except Exception:
                if attempt == _FORWARD_TRIES:
                    raise
                log.warning("step %s failed, trying again", type(step).__name__, exc_info=True)
                await trio.sleep(_FORWARD_PAUSE * attempt)
