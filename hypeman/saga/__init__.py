"""Runs and undoes plans; the only implementation of undo. See runner.py."""

from hypeman.saga.runner import Effects, UndoFailed, carry_forward, carry_out, take_back

__all__ = ["Effects", "UndoFailed", "carry_forward", "carry_out", "take_back"]
