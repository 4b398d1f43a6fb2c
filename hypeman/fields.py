"""Field types shared by the Structs of several capabilities: the contract's notation of times, sizes,
rates and durations (§1.5 to §1.8).

Text forms stay text here and are parsed by ``units`` and ``ids`` in the service, because each field
has its own error code there; only what msgspec checks better itself (numbers, enums, times) is
checked during decoding.

What the Structs emit (§0): a nullable field has the type ``T | None`` and is always present; an
optional one has ``T | UnsetType`` and is omitted while ``UNSET``. Requests always use ``None`` for
absent, since they are only decoded. Structs used in both directions (the policies) set
``omit_defaults``, so that absent stays absent and an explicit 0 or false is echoed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import Meta

Timestamp = Annotated[datetime, Meta(tz=True, description="RFC 3339 date-time")]
Duration = Annotated[
    str,
    Meta(
        description="Go duration",
        examples=["90s", "1h30m"],
        extra_json_schema={"pattern": r"^(0|([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$"},
    ),
]
Size = Annotated[str, Meta(description="Integer and optional binary unit", examples=["512MB", "2GB"])]
Rate = Annotated[
    str, Meta(description="Decimal bits per second, or a binary size per second", examples=["100mbps", "12MB/s"])
]
DiskRate = Annotated[str, Meta(description="Size per second", examples=["100MB/s"])]
Name = Annotated[
    str,
    Meta(
        description="1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
        extra_json_schema={"pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "maxLength": 63},
    ),
]
TagMap = Annotated[
    dict[str, str],
    Meta(
        description="Up to 50 pairs; keys of 1 to 128, values of up to 256 of letters, digits and ' _.:/=+@-'",
        extra_json_schema={"propertyNames": {"pattern": "^[A-Za-z0-9 _.:/=+@-]{1,128}$"}, "maxProperties": 50},
    ),
]
Platform = Annotated[str, Meta(description="os/arch[/variant]", examples=["linux/amd64"])]
Port = Annotated[int, Meta(ge=1, le=65535)]
MAX_INT = 2**63 - 1
"""Of every integer in a request: clients in other languages cannot read a larger one back."""
Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
Positive = Annotated[int, Meta(ge=1, le=MAX_INT)]

_COMPONENT = "[a-z0-9]+((\\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN = "[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
ImageName = Annotated[
    str,
    Meta(
        description="OCI reference, normalised by Docker's rules",
        examples=["nginx:alpine", "ghcr.io/acme/tool:1.2"],
        extra_json_schema={
            # As in images/reference.py. A first part with upper case can only be a host.
            "pattern": "^"
            f"(({_DOMAIN}(\\.{_DOMAIN})*|\\[[a-fA-F0-9]*:[a-fA-F0-9:]*\\])(:[0-9]{{1,5}})?/)?{_COMPONENT}(/{_COMPONENT})*"
            "(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[a-f0-9]{64})?$",
            "maxLength": 255,
        },
    ),
]
Argument = Annotated[str, Meta(pattern=r"^[^\x00]*$")]
"""A word of a command line."""
