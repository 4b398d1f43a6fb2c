"""Startup and readiness probes, which the node runs itself; the server's health checks are the liveness probe."""

from __future__ import annotations

import math
import ssl
from datetime import datetime

import httpx
import msgspec
import trio

from hypeman.instances.model.types import Instance
from hypeman.kube.kubelet.remote import open_exec
from hypeman.kube.local import LocalError, LocalServer
from hypeman.kube.podspec import Container, HttpGetAction, Probe, Refusal
from hypeman.kube.translate import port_number

_UNVERIFIED = ssl._create_unverified_context()  # noqa: S323  # as the kubelet: a probe checks that something answers


class Attempts:
    """One probe of one run of a container: what it says after some successes or failures in a row."""

    def __init__(self, container: Container, probe: Probe) -> None:
        self._container = container
        self._probe = probe
        self.succeeded = False
        self.failed = False
        """Neither is true until one of the thresholds was reached once."""
        self._successes = 0
        self._failures = 0
        self._due = trio.current_time() + probe.initial_delay_seconds

    async def look(self, local: LocalServer, instance: Instance) -> float:
        """Probe if it is time. Returns the seconds until there is something to do: at once, if it has failed now."""
        if (left := self._due - trio.current_time()) > 0:
            return left
        had_failed = self.failed
        passed = await passes(self._probe, self._container, local, instance)
        self._successes = self._successes + 1 if passed else 0
        self._failures = 0 if passed else self._failures + 1
        if self._successes >= self._probe.success_threshold:
            self.succeeded, self.failed = True, False
        elif self._failures >= self._probe.failure_threshold:
            self.succeeded, self.failed = False, True
        self._due = trio.current_time() + self._probe.period_seconds
        return 0.0 if self.failed and not had_failed else float(self._probe.period_seconds)


class Probing:
    """The probes of one run of a container that the node runs: startup until it succeeds, then readiness."""

    def __init__(self, container: Container, started_at: datetime | None, *, is_started: bool = False) -> None:
        """``is_started``: the startup probe has succeeded already, as an earlier program reported."""
        self.started_at = started_at
        startup = None if is_started else container.startup_probe
        self._container = container
        self._startup = Attempts(container, startup) if startup is not None else None
        self._readiness = self._first_readiness() if startup is None else None

    @property
    def is_started(self) -> bool:
        return self._startup is None or self._startup.succeeded

    @property
    def has_failed_to_start(self) -> bool:
        return self._startup is not None and self._startup.failed

    @property
    def is_ready(self) -> bool:
        return self.is_started and (self._container.readiness_probe is None or (
            self._readiness is not None and self._readiness.succeeded
        ))  # fmt: skip

    async def look(self, local: LocalServer, instance: Instance) -> float:
        """Probe if it is time. Returns the seconds until there is something to do."""
        if not self.is_started:
            return await self._start(local, instance)
        return math.inf if self._readiness is None else await self._readiness.look(local, instance)

    async def _start(self, local: LocalServer, instance: Instance) -> float:
        assert self._startup is not None, "it has not started yet"
        pause = await self._startup.look(local, instance)
        if not self._startup.succeeded:
            return pause
        self._readiness = self._first_readiness()
        return 0.0

    def _first_readiness(self) -> Attempts | None:
        probe = self._container.readiness_probe
        return None if probe is None else Attempts(self._container, probe)


async def passes(probe: Probe, container: Container, local: LocalServer, instance: Instance) -> bool:
    """Probe once."""
    ip = (instance.network.ip or "") if instance.network else ""
    with trio.move_on_after(probe.timeout_seconds):
        try:
            return await _attempt(probe, container, local, instance, ip)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, LocalError, Refusal):
            return False
    return False


async def _attempt(probe: Probe, container: Container, local: LocalServer, instance: Instance, ip: str) -> bool:
    if probe.exec is not None:
        return await _succeeds(local, instance.id, probe.exec.command)
    if probe.http_get is not None:
        return await _answers(probe.http_get, ip, port_number(probe.http_get.port, container))
    if probe.tcp_socket is not None:
        stream = await trio.open_tcp_stream(ip, port_number(probe.tcp_socket.port, container))
        await stream.aclose()
    return True


async def _succeeds(local: LocalServer, instance_id: str, command: tuple[str, ...]) -> bool:
    async with open_exec(local, instance_id, {"command": command}) as program:
        last: str | bytes | None = None
        while (message := await program.receive()) is not None:
            last = message
    try:
        return msgspec.json.decode(last or "", type=_Ended).exit_code == 0
    except msgspec.DecodeError:
        return False


class _Ended(msgspec.Struct, rename="camel"):
    exit_code: int


async def _answers(action: HttpGetAction, ip: str, port: int) -> bool:
    url = f"{action.scheme.lower()}://{ip}:{port}{'' if action.path.startswith('/') else '/'}{action.path}"
    async with (
        httpx.AsyncClient(verify=_UNVERIFIED, trust_env=False) as client,
        client.stream("GET", url, headers={"User-Agent": "kube-probe/hypeman"}) as response,
    ):
        return 200 <= response.status_code < 400  # the body is the guest's, and may have no end
