"""Readiness probes, which the node runs itself: the server's health checks restart what fails, readiness does not."""

from __future__ import annotations

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


class Readiness:
    """The probe of one run of a container."""

    def __init__(self, container: Container, started_at: datetime | None = None) -> None:
        self._container = container
        self._probe = container.readiness_probe
        self.started_at = started_at
        self.is_ready = False
        self._successes = 0
        self._failures = 0
        self._due = trio.current_time() + (self._probe.initial_delay_seconds if self._probe else 0)

    async def look(self, local: LocalServer, instance: Instance) -> float:
        """Probe if it is time. Returns the seconds until it is again."""
        assert self._probe is not None, "called only with a probe"
        if (left := self._due - trio.current_time()) > 0:
            return left
        passed = await self.passes(local, instance)
        self._successes = self._successes + 1 if passed else 0
        self._failures = 0 if passed else self._failures + 1
        if self._successes >= self._probe.success_threshold:
            self.is_ready = True
        elif self._failures >= self._probe.failure_threshold:
            self.is_ready = False
        self._due = trio.current_time() + self._probe.period_seconds
        return float(self._probe.period_seconds)

    async def passes(self, local: LocalServer, instance: Instance) -> bool:
        """Probe once; without a probe, true."""
        if self._probe is None:
            return True
        ip = (instance.network.ip or "") if instance.network else ""
        with trio.move_on_after(self._probe.timeout_seconds):
            try:
                return await self._attempt(self._probe, local, instance, ip)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, LocalError, Refusal):
                return False
        return False

    async def _attempt(self, probe: Probe, local: LocalServer, instance: Instance, ip: str) -> bool:
        if probe.exec is not None:
            return await _succeeds(local, instance.id, probe.exec.command)
        if probe.http_get is not None:
            return await _answers(probe.http_get, ip, port_number(probe.http_get.port, self._container))
        if probe.tcp_socket is not None:
            stream = await trio.open_tcp_stream(ip, port_number(probe.tcp_socket.port, self._container))
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
