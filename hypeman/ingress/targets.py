"""Where instances are, as ingresses need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hypeman.egress.front import Place
from hypeman.instances.board import Board
from hypeman.instances.model.policies import standby_rules
from hypeman.instances.model.types import InstanceState, WakeOn
from hypeman.network.leases import get_lease
from hypeman.store import Store

_ENDED = (InstanceState.SHUTDOWN, InstanceState.STOPPED)


class Targets:
    """A view of the instances as they are now."""

    def __init__(self, board: Board, store: Store, changed: Callable[[Iterable[str], bool], object]) -> None:
        """``changed`` gets the names and ids by which an instance was or is known when something about it changes, and
        whether it has ended: its connections are over, other than in standby or while it is being deleted."""
        self._board = board
        self._store = store
        self._changed = changed
        self._names: dict[str, str] = {}
        """As last reported, by id."""
        board.listen(self._on_change)

    def _on_change(self, instance_id: str) -> None:
        before = self._names.pop(instance_id, "")
        name = self._board.name_of(instance_id) or ""
        if name:
            self._names[instance_id] = name
        record = self._board.get(instance_id)
        ended = record is None or record.state in _ENDED
        self._changed({instance_id, before, name} - {""}, ended)

    def find(self, ref: str) -> str:
        """The name of the instance that a client names. Raises NotFound or Ambiguous."""
        return self._board.find(ref).name

    def name_of(self, instance_id: str) -> str:
        """How an error calls it."""
        return f"instance {self._board.name_of(instance_id) or instance_id}"

    def place_of(self, name: str) -> Place:
        """By exact name or id: who sends a host name must not find instances by guessing prefixes.

        A connection to one in standby wakes it, where its policy says so.
        """
        record = self._board.get(self._board.id_of(name) or name)
        if record is None or record.deleting:
            return Place("", exists=False)
        asleep = (
            record.state is InstanceState.STANDBY and standby_rules(record.spec.auto_standby).wake is not WakeOn.NONE
        )
        if record.state is not InstanceState.RUNNING and not asleep:
            return Place("", exists=True)
        lease = self._store.read(lambda txn: get_lease(txn, record.id))
        return Place(lease.ipv4 if lease is not None else "", exists=True)
