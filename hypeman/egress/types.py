"""The egress path in the API (§2.4): credential rules, the policy of an instance, records of requests.

The guest sees only a placeholder; the real value comes from the request's ``env`` and is inserted into
outgoing HTTPS requests. No type here contains the value of a credential, or the path or query of a
request: a policy names where values come from and where they go, a record names the credentials used.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from hypeman.fields import Timestamp

RecordKind = Literal["request", "passed_through", "refused"]


class EgressEnforcementMode(enum.StrEnum):
    """Which direct TCP is rejected: all of it, or only to ports 80 and 443."""

    ALL = "all"
    HTTP_HTTPS_ONLY = "http_https_only"


class CredentialSource(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the real value comes from: exactly one of these."""

    env: Annotated[str, Meta(description="Key in the request's env that holds the real value")] | None = None
    named: (
        Annotated[
            str,
            Meta(
                description="A source in the server's configuration (egress.sources): a file, a systemd credential or "
                "the output of a program. Its hosts must cover those of all inject rules"
            ),
        ]
        | None
    ) = None


class BasicForm(Struct, frozen=True, kw_only=True):
    username: Annotated[
        str, Meta(max_length=256, description="User name; the value is the password", examples=["x-access-token"])
    ]


class InjectAs(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the credential becomes in a request: header and format together, or exactly one of the others."""

    header: Annotated[str, Meta(description="Header that is set on outbound requests")] | None = None
    format: Annotated[str, Meta(description="Must contain ${value}", examples=["Bearer ${value}"])] | None = None
    basic: Annotated[BasicForm, Meta(description="Sets Authorization to a Basic credential")] | None = None
    query: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=256,
                description="Parameter of the query that is set to the value; all of that name that the guest sent "
                "are removed",
            ),
        ]
        | None
    ) = None


class InjectRule(Struct, frozen=True, kw_only=True):
    as_: InjectAs = field(name="as")
    hosts: Annotated[
        tuple[str, ...] | None, Meta(description="Exact names, or *.x.y for one label; absent: every destination")
    ] = None
    ports: (
        Annotated[
            tuple[Annotated[int, Meta(ge=1, le=65535)], ...],
            Meta(min_length=1, max_length=16, description="TCP ports of the hosts; absent: 443"),
        ]
        | None
    ) = None


class CredentialPolicy(Struct, frozen=True, kw_only=True):
    """One credential: where its real value comes from and where it is inserted."""

    source: CredentialSource
    inject: Annotated[tuple[InjectRule, ...], Meta(min_length=1)]


class EgressPolicy(Struct, frozen=True, kw_only=True):
    """The stored egress policy of an instance, without credential values."""

    instance_id: str
    instance_name: str
    mode: Annotated[EgressEnforcementMode, Meta(description="Which direct TCP of the guest is rejected")]
    credentials: Annotated[
        dict[str, CredentialPolicy], Meta(description="By the name under which the guest sees a placeholder")
    ]


class EgressRecord(Struct, frozen=True, kw_only=True):
    """One completed mediated request, allowed or denied."""

    time: Timestamp
    kind: Annotated[
        RecordKind,
        Meta(description="passed_through: not decrypted; refused: a connection that never became a request"),
    ]
    host: str
    port: int
    method: str
    status: Annotated[int, Meta(description="0 where there was none")]
    reason: Annotated[str, Meta(description="ok, or the code returned to the denied client")]
    injected: bool
    credentials: Annotated[tuple[str, ...], Meta(description="Names of the credentials whose rules were applied")]
    bytes_up: int
    bytes_down: int
    ms: float
    http: Annotated[int, Meta(description="Major version of HTTP that the guest used")]
