"""Runs and undoes plans; the only implementation of undo. See runner.py."""

from hypeman.saga.runner import Step, UndoFailed, carry_forward, carry_out, take_back

__all__ = ["Step", "UndoFailed", "carry_forward", "carry_out", "take_back"]
