"""What the API says about the egress path of an instance: its policy, and what became of its requests.

Neither has a value of a credential in it, nor the path or query of a request: the policy names where
values come from and where they go, a record names the credentials that were used.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from hypeman.egress.types import CredentialPolicy
from hypeman.fields import Timestamp
from hypeman.instances.types import EgressEnforcementMode

RecordKind = Literal["request", "passed_through", "refused"]


class EgressPolicy(Struct, frozen=True, kw_only=True):
    """What an instance may do on its way out, as it is stored. Never a credential's value."""

    instance_id: str
    instance_name: str
    mode: Annotated[EgressEnforcementMode, Meta(description="Which direct TCP of the guest is rejected")]
    credentials: Annotated[
        dict[str, CredentialPolicy], Meta(description="By the name under which the guest sees a stand-in")
    ]


class EgressRecord(Struct, frozen=True, kw_only=True):
    """One mediated request that ended, allowed or denied."""

    time: Timestamp
    kind: Annotated[
        RecordKind,
        Meta(description="passed_through: carried unread; refused: a connection that never became a request"),
    ]
    host: str
    port: int
    method: str
    status: Annotated[int, Meta(description="0 where there was none")]
    reason: Annotated[str, Meta(description="ok, or the code that the denied client was given")]
    injected: bool
    credentials: Annotated[tuple[str, ...], Meta(description="Names of those whose rules were applied")]
    bytes_up: int
    bytes_down: int
    ms: float
    http: Annotated[int, Meta(description="Major version that the guest spoke")]
