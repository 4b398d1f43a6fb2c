"""Names of running instances: for guests through the resolver, for the host in its hosts file, if configured."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import trio

from hypeman.config import NetworkConfig
from hypeman.host.hosts_file import write_block
from hypeman.network.addressing import Subnet
from hypeman.network.closed_names import (
    nothing,
    read_addresses,
    read_question,
    refusal,
    reply_with,
    upstream_query,
)
from hypeman.network.names import Zone, answer, failure, hosts_lines
from hypeman.network.resolver import Instead, Resolver
from hypeman.network.types import Lease

log = logging.getLogger(__name__)

_SETTLE = 0.1
"""Seconds; changes within them are written to the hosts file together."""


class NameRules(Protocol):
    """Which names an instance may look up."""

    def may_look_up(self, instance_id: str, name: str) -> bool:
        """``name`` is in lower case; one that is not a host name is empty. What is refused is recorded."""
        ...

    def looked_up(self, instance_id: str, name: str, addresses: Sequence[str], seconds: float) -> None:
        """The guest received these addresses, valid for so long."""
        ...


class GuestNames:
    """The directory of the resolver. ``use`` gives it the names, which belong to the instances."""

    def __init__(self, config: NetworkConfig, subnet: Subnet, living: Mapping[str, Lease]) -> None:
        """``living`` is the network's own table, instance → lease. Raises ValueError for a domain that is none."""
        self._domain = config.domain.rstrip(".").lower()
        self._hosts_file = config.hosts_file
        self._living = living
        self._id_of: Callable[[str], str | None] = lambda name: None
        self._name_of: Callable[[str], str | None] = lambda instance_id: None
        self._of_stack: Callable[[str, str], str | None] = lambda instance_id, service: None
        self._change = trio.Event()
        self._rules: NameRules | None = None
        self._ids: dict[str, str] = {}
        """Address → instance, of those that asked."""
        self._resolver: Resolver | None = None
        if self._domain:
            zone = Zone.parse(self._domain, subnet, socket.gethostname())
            self._resolver = Resolver(
                str(subnet.gateway),
                config.dns_server,
                lambda query, asker: answer(query, asker, zone, self),
                screen=self._screen,
            )

    def use(
        self,
        *,
        id_of: Callable[[str], str | None],
        name_of: Callable[[str], str | None],
        of_stack: Callable[[str, str], str | None] = lambda instance_id, service: None,
        rules: NameRules | None = None,
    ) -> None:
        """``id_of`` an instance's name, ``name_of`` its id, ``of_stack`` the id of a service's instance in the stack of
        an instance; None if there is none. ``rules`` are asked about closed guests; without them these look up
        nothing."""
        self._id_of, self._name_of, self._of_stack, self._rules = id_of, name_of, of_stack, rules

    @property
    def bound(self) -> bool:
        """Whether guests ask the gateway for names."""
        return self._resolver is not None and self._resolver.bound

    def bind(self) -> None:
        """Once the gateway's address exists. If its port 53 is taken, guests have no such names."""
        if self._resolver is None or self._resolver.bound:
            return
        try:
            self._resolver.bind()
        except OSError as error:
            log.warning("port 53 of the gateway cannot be bound (%s): guests ask network.dns_server", error.strerror)

    def close(self) -> None:
        if self._resolver is not None:
            self._resolver.close()

    def changed(self) -> None:
        """An instance came or went."""
        self._change.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer guests and keep the hosts file, until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._resolver is not None:
                await nursery.start(self._resolver.run)
            if self._hosts_file and self._domain:
                nursery.start_soon(self._keep_hosts_file)
            task_status.started()

    # Closed guests

    def _screen(self, query: bytes, asker: str) -> bytes | Instead | None:
        """For the resolver: what becomes of a query for the upstream server."""
        lease = self._lease_of(asker)
        if lease is None or not lease.reach.closed:
            return None
        question = read_question(query)
        if question is None:
            return failure(query)
        rules, name, instance_id = self._rules, question.name, lease.instance_id
        if rules is None or not rules.may_look_up(instance_id, name):
            return refusal(query, "no egress rule of this instance allows this host")
        if not question.addresses:
            return nothing(query)

        def finish(reply: bytes) -> bytes:
            found = read_addresses(reply)
            if found.addresses:
                rules.looked_up(instance_id, name, found.addresses, found.seconds)
            return reply_with(query, name, found)

        return Instead(upstream_query(name), finish)

    def _lease_of(self, address: str) -> Lease | None:
        lease = self._living.get(self._ids.get(address, ""))
        if lease is None or lease.ipv4 != address:
            lease = next((each for each in self._living.values() if each.ipv4 == address), None)
            if lease is not None:
                self._ids[address] = lease.instance_id
        return lease

    # The directory

    def by_name(self, name: str) -> Lease | None:
        instance_id = self._id_of(name)
        return self._living.get(instance_id) if instance_id is not None else None

    def of_stack(self, asker: str, service: str) -> Lease | None:
        lease = self._lease_of(asker)
        instance_id = self._of_stack(lease.instance_id, service) if lease is not None else None
        return self._living.get(instance_id) if instance_id is not None else None

    def by_address(self, address: str) -> tuple[str, Lease] | None:
        for lease in self._living.values():
            if lease.ipv4 == address:
                name = self._name_of(lease.instance_id)
                return (name, lease) if name is not None else None
        return None

    async def _keep_hosts_file(self) -> None:
        while True:
            await trio.sleep(_SETTLE)
            self._change = trio.Event()
            known = [
                (name, lease) for lease in self._living.values()
                if (name := self._name_of(lease.instance_id)) is not None
            ]  # fmt: skip
            lines = hosts_lines(known, self._domain)
            try:
                await trio.to_thread.run_sync(write_block, Path(self._hosts_file), lines)
            except OSError as error:
                log.error("network.hosts_file %s cannot be written: %s", self._hosts_file, error.strerror)
            await self._change.wait()
