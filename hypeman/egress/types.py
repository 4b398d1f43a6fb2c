"""What is said about credentials: which real value goes into which header of which request (§2.4).

The guest sees only a stand-in; the real value comes from the request's ``env`` and is inserted on
HTTPS requests on their way out.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field


class CredentialSource(Struct, frozen=True, kw_only=True):
    env: Annotated[str, Meta(description="Key in the request's env that holds the real value")]


class InjectAs(Struct, frozen=True, kw_only=True):
    header: Annotated[str, Meta(description="Header that is set on outbound requests")]
    format: Annotated[str, Meta(description="Must contain ${value}", examples=["Bearer ${value}"])]


class InjectRule(Struct, frozen=True, kw_only=True):
    as_: InjectAs = field(name="as")
    hosts: Annotated[
        tuple[str, ...] | None, Meta(description="Exact names, or *.x.y for one label; absent: every destination")
    ] = None


class CredentialPolicy(Struct, frozen=True, kw_only=True):
    """One credential: where its real value comes from and where it is inserted."""

    source: CredentialSource
    inject: Annotated[tuple[InjectRule, ...], Meta(min_length=1)]
