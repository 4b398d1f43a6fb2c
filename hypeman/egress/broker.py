"""Policies whose credentials have values that the server obtains: keeps them valid while their instances run.

    a value   obtained once for all who need it, ahead of time: when the first instance that needs it is set, and again
              well before it expires; each time the policies of those instances are set again
    missing   the rule goes to the data plane without a value; requests that need it are held there (``Timeouts.held``)
              and then refused. After a failure the attempts continue, with growing pauses
    kept      in memory, and with the policies sealed (service.py), as long as an instance needs it

A value is not stored: after a restart of the server it is obtained again. Another refresh token is stored before the
access token that came with it is used, so that the chain does not break.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol

import msgspec
import trio

from hypeman.egress.oauth2 import Token, check_secret, token_url
from hypeman.egress.policy import check_credentials, token_name
from hypeman.egress.service import Egress
from hypeman.egress.sources import Source, Sources, sleep_until_renewal
from hypeman.egress.transforms import Unavailable, Value
from hypeman.egress.types import CredentialPolicy, EgressAccess, OAuth2Form
from hypeman.errors import InternalError, InvalidRequest

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between attempts; each pause is twice the previous one."""

SupplyKey = tuple[str, ...]

_until_renewal = partial(sleep_until_renewal, lifetime=3600.0)


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
        """By credential, or by ``token_name``."""


class TokenSource(Protocol):
    async def obtain(self, form: OAuth2Form, secret: str) -> Token:
        """Raises Unavailable or InvalidRequest."""
        ...


class KeepRotated(Protocol):
    async def __call__(self, instance_id: str, env: str, used: str, new: str) -> None:
        """Store ``new`` as the value of ``env`` if it is still ``used``."""
        ...


class _Grant:
    """What the tokens of one rule are obtained with."""

    def __init__(
        self, form: OAuth2Form, secret: str, tokens: TokenSource, keep: Callable[[str, str], Awaitable[None]]
    ) -> None:
        self._form = form
        self._secret = secret
        self._tokens = tokens
        self._keep = keep

    async def obtain(self) -> Value:
        """Raises Unavailable."""
        token = await self._tokens.obtain(self._form, self._secret)
        if token.secret is not None:
            used, self._secret = self._secret, token.secret
            with trio.CancelScope(shield=True):  # the old one is void
                await self._keep(used, token.secret)
        return token.value


class Broker:
    """``run`` in a nursery; the other methods may be called once it has reported started."""

    def __init__(self, egress: Egress, sources: Sources, tokens: TokenSource, keep: KeepRotated) -> None:
        self._egress = egress
        self._sources = sources
        self._tokens = tokens
        self._keep = keep
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
        check_credentials(credentials, env)
        self._sources.check(credentials)
        for key, policy in credentials.items():
            for rule in policy.inject:
                form, env_key = rule.as_.oauth2, policy.source.env
                if form is None:
                    continue
                token_url(form)
                if env_key is not None:
                    check_secret(form, env[env_key])
                elif form.grant == "refresh_token":
                    raise InvalidRequest(f"credential {key!r}: a refresh token changes, so it cannot be a named source")

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
            if not self._may_have(instance_id, key, policy):
                continue
            if policy.source.named is not None and any(rule.as_.oauth2 is None for rule in policy.inject):
                guest.needs[key] = self._named(policy.source.named)
            for number, rule in enumerate(policy.inject):
                if rule.as_.oauth2 is not None:
                    guest.needs[token_name(key, number)] = self._token(guest, key, number, rule.as_.oauth2)
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

    def _may_have(self, instance_id: str, key: str, policy: CredentialPolicy) -> bool:
        """Whether the configuration, which may have changed since ``check``, still says so. If not, the rule is in
        force without a value: its requests are refused."""
        try:
            self._sources.check({key: policy})
        except InvalidRequest as error:
            log.error("egress credentials of %s: %s", instance_id, error.message)
            return False
        return True

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

    def _token(self, guest: _Guest, key: str, number: int, form: OAuth2Form) -> _Supply:
        """Of this instance alone: tokens are not shared."""
        source = guest.credentials[key].source
        if source.env is None:
            assert source.named is not None
            return self._token_of_source(guest, key, number, form, self._sources.find(source.named))
        secret = guest.secrets[source.env]
        digest = hashlib.sha256(msgspec.json.encode((form, secret))).hexdigest()
        grant = _Grant(form, secret, self._tokens, partial(self._keep, guest.instance_id, source.env))
        return self._supply(("token", guest.instance_id, key, str(number), digest), grant.obtain, _until_renewal)

    def _token_of_source(self, guest: _Guest, key: str, number: int, form: OAuth2Form, source: Source) -> _Supply:
        async def obtain() -> Value:
            return (await self._tokens.obtain(form, (await source.obtain()).text)).value

        digest = hashlib.sha256(msgspec.json.encode(form)).hexdigest()
        name = ("token", guest.instance_id, key, str(number), source.name, digest)
        return self._supply(name, obtain, _until_renewal)

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
