"""Egress: policies, records, approvals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import trio
from msgspec import UNSET

from hypeman.egress.rules import check_url
from hypeman.egress.types import (
    AccessAction,
    AccessDefault,
    AccessRule,
    CredentialPolicy,
    CredentialSource,
    EgressApproval,
    EgressCheck,
    EgressEnforcementMode,
    EgressPolicy,
    EgressProposal,
    EgressRecord,
    InjectAs,
    InjectRule,
)
from hypeman.errors import (
    NotFound,
)
from hypeman.instances.model.types import (
    Instance,
)
from tests.fakes.services.common import NOW
from tests.fakes.services.instances import FakeInstances


class FakeEgressRecords:
    def __init__(self, records: Iterable[EgressRecord], new: trio.MemoryReceiveChannel[EgressRecord] | None) -> None:
        self._records = iter(records)
        self._new = new
        self.closed = False

    def __aiter__(self) -> AsyncIterator[EgressRecord]:
        return self

    async def __anext__(self) -> EgressRecord:
        await trio.lowlevel.checkpoint()
        for record in self._records:
            return record
        if self._new is None:
            raise StopAsyncIteration
        return await self._new.__anext__()

    async def aclose(self) -> None:
        self.closed = True


INJECT = InjectRule(hosts=("api.example.com",), as_=InjectAs(header="Authorization", format="Bearer ${value}"))


@dataclass
class FakeEgress:
    """Policies and records by the instance's name; followers get what is put into ``new``, until it is closed."""

    instances: FakeInstances
    policies: dict[str, EgressPolicy] = field(default_factory=dict)
    records: dict[str, list[EgressRecord]] = field(default_factory=dict)
    streams: list[FakeEgressRecords] = field(default_factory=list)
    held: dict[str, EgressApproval] = field(default_factory=dict)
    decided: list[tuple[str, bool, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.new, self._receive = trio.open_memory_channel[EgressRecord](100)

    def allow(self, instance: Instance, *rules: InjectRule) -> None:
        """Gives ``instance`` a policy with one credential, API_KEY, and these rules."""
        credential = CredentialPolicy(source=CredentialSource(env="REAL_KEY"), inject=rules or (INJECT,))
        self.policies[instance.name] = EgressPolicy(
            instance_id=instance.id,
            instance_name=instance.name,
            mode=EgressEnforcementMode.ALL,
            credentials={"API_KEY": credential},
        )

    def check(self, ref: str, url: str, method: str) -> EgressCheck:
        found = self.policy(ref).access
        access = found if found is not UNSET else None
        return check_url(access, url, method, NOW, web_only=True)

    def proposal(self, ref: str) -> EgressProposal:
        self.policy(ref)
        rule = AccessRule(action=AccessAction.ALLOW, hosts=("api.example.com",), ports=(443,), methods=("GET",))
        return EgressProposal(requests=2, complete=True, default=AccessDefault.DENY, rules=(rule,))

    def approvals(self, ref: str | None = None) -> list[EgressApproval]:
        instance = None if ref is None else self.policy(ref).instance_id
        return [each for each in self.held.values() if instance in (None, each.instance_id)]

    async def decide(self, ref: str, approval: str, *, allow: bool, seconds: float) -> EgressApproval:
        self.policy(ref)
        if approval not in self.held:
            raise NotFound(f"no request waits for approval {approval!r}", code="no_approval")
        self.decided.append((approval, allow, seconds))
        return self.held.pop(approval)

    def hold(self, instance: Instance) -> EgressApproval:
        """A request that waits for an approval."""
        held = EgressApproval(
            id="a1", instance_id=instance.id, rule="writes", scheme="https", host="api.example.com", port=443,
            method="POST", path="/v1/x", waiting=1, since=NOW, expires_at=NOW,
        )  # fmt: skip
        self.held[held.id] = held
        return held

    def ca_pem(self) -> bytes:
        return b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

    def policy(self, ref: str) -> EgressPolicy:
        name = self.instances.find(ref).name
        if name not in self.policies:
            raise NotFound(f"the egress of instance {name} is not mediated", code="no_egress_policy")
        return self.policies[name]

    async def requests(self, ref: str, *, tail: int, follow: bool) -> FakeEgressRecords:
        name = self.policy(ref).instance_name
        kept = self.records.get(name, [])
        stream = FakeEgressRecords(kept[max(0, len(kept) - tail) :], self._receive if follow else None)
        self.streams.append(stream)
        return stream
