"""Policies whose credentials have values that the server obtains: keeps them valid while their instances run.

    a value   obtained once for all who need it, ahead of time: when the first instance that needs it is set, and again
              well before it expires; each time the policies of those instances are set again
    missing   the rule goes to the data plane without a value; requests that need it are held there (``Timeouts.held``)
              and then refused. After a failure the attempts continue, with growing pauses
    kept      in memory, and with the policies sealed (service.py), as long as an instance needs it

A value is not stored: after a restart of the server it is obtained again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

import trio

from hypeman.egress.policy import check_credentials
from hypeman.egress.service import Egress
from hypeman.egress.sources import Sources, Unavailable
from hypeman.egress.transforms import Value
from hypeman.egress.types import CredentialPolicy, EgressAccess
from hypeman.errors import InternalError, InvalidRequest

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between attempts; each pause is twice the previous one."""

SupplyKey = tuple[str, ...]


class _Supply:
    """One value and the guests that need it."""

    def __init__(
        self, obtain: Callable[[], Awaitable[Value]], wait_changed: Callable[[Value], Awaitable[None]]
    ) -> None:
        self.obtain = obtain
        self.wait_changed = wait_changed
        self.value: Value | None = None
        self.guests: set[_Guest] = set()
        self.scope = trio.CancelScope()


class _Guest:
    """An instance as its policy was set last."""

    def __init__(
        self,
        instance_id: str,
        source_ip: str,
        credentials: Mapping[str, CredentialPolicy],
        secrets: Mapping[str, str],
        web_only: bool,
        access: EgressAccess | None,
    ) -> None:
        self.instance_id = instance_id
        self.source_ip = source_ip
        self.credentials = credentials
        self.secrets = secrets
        self.web_only = web_only
        self.access = access
        self.lock = trio.Lock()
        self.needs: dict[str, _Supply] = {}
        """By credential."""


class Broker:
    """``run`` in a nursery; the other methods may be called once it has reported started."""

    def __init__(self, egress: Egress, sources: Sources) -> None:
        self._egress = egress
        self._sources = sources
        self._guests: dict[str, _Guest] = {}
        self._supplies: dict[SupplyKey, _Supply] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def check(self, credentials: Mapping[str, CredentialPolicy], env: Mapping[str, str]) -> None:
        """Raise InvalidRequest unless the credentials are valid with the values in ``env``."""
        self._sources.check(credentials)
        check_credentials(credentials, env)

    async def set_policy(
        self,
        instance_id: str,
        source_ip: str,
        credentials: Mapping[str, CredentialPolicy],
        secrets: Mapping[str, str],
        *,
        web_only: bool = False,
        access: EgressAccess | None = None,
    ) -> None:
        """As ``Egress.set_policy``, also for values that are to be obtained; does not wait for them."""
        guest = _Guest(instance_id, source_ip, credentials, secrets, web_only, access)
        before = self._guests.get(instance_id)
        if before is not None:
            guest.lock = before.lock
        self._guests[instance_id] = guest
        for key, policy in credentials.items():
            if policy.source.named is not None:
                guest.needs[key] = self._named(policy.source.named)
        for supply in guest.needs.values():
            supply.guests.add(guest)
        if before is not None:
            self._let_go(before)
        try:
            await self._apply(guest)
        except BaseException:
            if self._guests.get(instance_id) is guest:
                del self._guests[instance_id]
                self._let_go(guest)
            raise

    async def remove(self, instance_id: str) -> None:
        """As ``Egress.remove``; values that no other instance needs are forgotten."""
        guest = self._guests.pop(instance_id, None)
        if guest is None:
            await self._egress.remove(instance_id)
            return
        self._let_go(guest)
        async with guest.lock:
            if instance_id not in self._guests:
                await self._egress.remove(instance_id)

    async def _apply(self, guest: _Guest) -> None:
        """Set the policy with the values that there are, unless there is a newer policy."""
        async with guest.lock:
            if self._guests.get(guest.instance_id) is not guest:
                return
            obtained = {key: supply.value for key, supply in guest.needs.items() if supply.value is not None}
            await self._egress.set_policy(
                guest.instance_id,
                guest.source_ip,
                guest.credentials,
                guest.secrets,
                obtained=obtained,
                web_only=guest.web_only,
                access=guest.access,
            )

    # ── Values ───────────────────────────────────────────────────────────────────────────────────

    def _named(self, name: str) -> _Supply:
        source = self._sources.find(name)
        return self._supply(("named", name), source.obtain, source.wait_changed)

    def _supply(
        self,
        key: SupplyKey,
        obtain: Callable[[], Awaitable[Value]],
        wait_changed: Callable[[Value], Awaitable[None]],
    ) -> _Supply:
        supply = self._supplies.get(key)
        if supply is None:
            supply = self._supplies[key] = _Supply(obtain, wait_changed)
            assert self._nursery is not None, "the broker runs"
            self._nursery.start_soon(self._keep_valid, key, supply)
        return supply

    def _let_go(self, guest: _Guest) -> None:
        for supply in guest.needs.values():
            supply.guests.discard(guest)
        for key, supply in list(self._supplies.items()):
            if not supply.guests:
                del self._supplies[key]
                supply.value = None
                supply.scope.cancel()

    async def _keep_valid(self, key: SupplyKey, supply: _Supply) -> None:
        pause = FIRST_PAUSE
        with supply.scope:
            while True:
                try:
                    value = await supply.obtain()
                    await self._use(supply, value)
                    pause = FIRST_PAUSE
                    await supply.wait_changed(value)
                    continue
                except (Unavailable, InvalidRequest) as error:
                    log.warning("egress credentials: %s", error.message)
                except Exception:  # a bug here must not end the server
                    log.exception("egress credentials: %s", key[0])
                await trio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    async def _use(self, supply: _Supply, value: Value) -> None:
        """Put a new value into the policies of those who need it. Raises InvalidRequest if it fits none of them."""
        before, supply.value = supply.value, value
        wrong: InvalidRequest | None = None
        fits = False
        for guest in tuple(supply.guests):
            try:
                await self._apply(guest)
                fits = True
            except InvalidRequest as error:
                wrong = error
            except InternalError as error:  # the engine is gone; the next one gets what was set before
                log.error("egress credentials of %s: %s", guest.instance_id, error.message)
                fits = True
        if wrong is not None and not fits:
            supply.value = before
            raise wrong
