"""The egress path in the API (§2.4): credential rules, the policy of an instance, records of requests.

The guest sees only a placeholder; the real value comes from the request's ``env`` and is inserted into
outgoing HTTPS requests. No type here contains the value of a credential, or the path or query of a
request: a policy names where values come from and where they go, a record names the credentials used.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from hypeman.fields import Duration, Timestamp

OAuth2Grant = Literal["client_credentials", "refresh_token", "jwt_bearer", "github_app", "google"]
RecordKind = Literal["request", "passed_through", "refused"]
Ruling = Literal["allowed", "denied", "observed", "approved", "held"]


class EgressEnforcementMode(enum.StrEnum):
    """Which direct TCP is rejected: all of it, or only to ports 80 and 443."""

    ALL = "all"
    HTTP_HTTPS_ONLY = "http_https_only"


class AccessAction(enum.StrEnum):
    ALLOW = "allow"
    DENY = "deny"
    ASK = "ask"
    """Hold the request until someone approves or denies it."""


class AccessDefault(enum.StrEnum):
    """What happens to a request that no rule matches."""

    ALLOW = "allow"
    DENY = "deny"
    """And everything but HTTP, TLS and names of allowed hosts is closed."""


class AccessRecord(enum.StrEnum):
    """How much of a request's target its record contains."""

    HOST = "host"
    PATH = "path"
    QUERY = "query"


class PrivateNetworks(enum.StrEnum):
    OPEN = "open"
    CLOSED = "closed"


class AccessRule(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A request that has all that is given. Or, with ``networks``, traffic that is neither HTTP nor TLS."""

    action: AccessAction
    name: Annotated[
        Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=48)] | None,
        Meta(description="Name of the rule in errors and records; default: # and its position, from 1"),
    ] = None
    hosts: Annotated[
        Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=1024)] | None,
        Meta(
            description="Exact names or addresses, *.x.y for one label more, **.x.y for one or more; absent: every host"
        ),
    ] = None
    ports: Annotated[
        Annotated[tuple[Annotated[int, Meta(ge=1, le=65535)], ...], Meta(max_length=64)] | None,
        Meta(description="Absent: every port"),
    ] = None
    methods: Annotated[
        Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=32)] | None,
        Meta(description="Absent: every method"),
    ] = None
    paths: Annotated[
        Annotated[tuple[Annotated[str, Meta(max_length=1024)], ...], Meta(max_length=128)] | None,
        Meta(
            description="Without query. * matches one segment, or anything at the end; absent: every path",
            examples=[["/v1/*", "/repos/*/issues"]],
        ),
    ] = None
    until: Annotated[Timestamp | None, Meta(description="The rule is skipped from this time on")] = None
    record: Annotated[AccessRecord, Meta(description="How much of a request's target its record contains")] = (
        AccessRecord.HOST
    )
    networks: Annotated[
        Annotated[tuple[Annotated[str, Meta(max_length=18)], ...], Meta(max_length=64)] | None,
        Meta(description="IPv4 CIDRs for traffic that is neither HTTP nor TLS, with ports; only to allow"),
    ] = None
    protocol: Annotated[Literal["tcp", "udp"] | None, Meta(description="With networks; default tcp")] = None


class EgressAccess(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where an instance may go: the first rule that matches decides, else the default."""

    rules: tuple[AccessRule, ...] = ()
    default: AccessDefault = AccessDefault.ALLOW
    observe: bool = False
    """Record what would be refused, and refuse nothing."""
    private_networks: PrivateNetworks | None = None
    """None: as the server is configured."""

    @property
    def closes(self) -> bool:
        """Whether everything is closed that is not allowed."""
        return self.default is AccessDefault.DENY and not self.observe


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


class SigV4Form(Struct, frozen=True, kw_only=True):
    region: Annotated[str, Meta(pattern="^[a-z0-9-]{1,64}$", examples=["eu-west-1"])]
    service: Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{1,64}$", examples=["s3"])]


class HmacForm(Struct, frozen=True, kw_only=True):
    scheme: Annotated[
        Literal["github", "stripe", "slack"],
        Meta(
            description="github: X-Hub-Signature-256; stripe: Stripe-Signature with t and v1; slack: X-Slack-Signature "
            "and X-Slack-Request-Timestamp"
        ),
    ]


class BodyForm(Struct, frozen=True, kw_only=True):
    """The placeholder in bodies of JSON and of forms is replaced by the value."""


class MtlsForm(Struct, frozen=True, kw_only=True):
    """The host is shown a client certificate. The value: the certificate, intermediates and the private key, in PEM."""


class PostgresForm(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The guest logs in to a server of Postgres with the placeholder as its password; the server gets the value."""

    user: Annotated[
        str,
        Meta(
            pattern=r"^[\x21-\x7e]([\x20-\x7e]{0,61}[\x21-\x7e])?$",
            description="Role that the password belongs to; logins as others are refused",
        ),
    ]
    database: (
        Annotated[
            str,
            Meta(pattern=r"^[\x21-\x7e]([\x20-\x7e]{0,61}[\x21-\x7e])?$", description="The only one; absent: any"),
        ]
        | None
    ) = None
    auth: Annotated[
        Literal["scram", "md5", "password"],
        Meta(
            description="The weakest way to authenticate that is accepted of the server: SCRAM-SHA-256 (with channel "
            "binding where it is offered); the MD5 hash as well; or the password itself as well, over TLS only"
        ),
    ] = "scram"
    tls: Annotated[
        Literal["verify", "off"],
        Meta(description="verify: TLS with a certificate for the name; off: the connection to the server is in clear"),
    ] = "verify"


class MysqlForm(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The guest logs in to MySQL or MariaDB with the placeholder as its password; the server gets the value."""

    user: Annotated[
        str,
        Meta(
            pattern=r"^[\x21-\x7e]([\x20-\x7e]{0,125}[\x21-\x7e])?$",
            description="User that the password belongs to; logins as others are refused",
        ),
    ]
    auth: Annotated[
        Literal["sha2", "native", "clear"],
        Meta(
            description="The weakest way to authenticate that is accepted of the server: caching_sha2_password; "
            "mysql_native_password as well; or the password itself as well (mysql_clear_password), over TLS only"
        ),
    ] = "native"
    tls: Annotated[
        Literal["verify", "off"],
        Meta(description="verify: TLS with a certificate for the name; off: the connection to the server is in clear"),
    ] = "verify"


class OAuth2Form(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An access token, which the server obtains with the value and renews ahead of time."""

    grant: Annotated[
        OAuth2Grant,
        Meta(
            description="What the value is: a client secret; a refresh token, or JSON with refresh_token and "
            "client_secret; a private key in PEM (jwt_bearer, github_app); the key file of a Google service account"
        ),
    ]
    token_url: (
        Annotated[
            str,
            Meta(
                pattern=r"^https://[^/?#@\\\s]+(/[^?#\s]*)?$",
                description="Where tokens are requested; github_app: the base of GitHub's API; may be left out for the "
                "last two grants",
            ),
        ]
        | None
    ) = None
    client_id: Annotated[str, Meta(max_length=512)] = ""
    client_auth: Annotated[
        Literal["basic", "post"], Meta(description="Where the client's secret is sent: Authorization or the body")
    ] = "basic"
    scope: Annotated[str, Meta(max_length=2048)] = ""
    audience: Annotated[str, Meta(max_length=512, description="client_credentials, jwt_bearer; default: token_url")] = (
        ""
    )
    issuer: Annotated[str, Meta(max_length=512, description="jwt_bearer: who signs")] = ""
    subject: Annotated[str, Meta(max_length=512, description="jwt_bearer: default issuer; google: user to act for")] = (
        ""
    )
    key_id: Annotated[str, Meta(max_length=256, description="jwt_bearer: kid")] = ""
    algorithm: Annotated[Literal["RS256", "ES256"], Meta(description="jwt_bearer")] = "RS256"
    installation_id: Annotated[str, Meta(pattern="^[0-9]{0,20}$", description="github_app")] = ""
    header: Annotated[str, Meta(description="Header that gets the token")] = "Authorization"
    format: Annotated[str, Meta(description="As of inject.as; the value is the token")] = "Bearer ${value}"


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
    sigv4: (
        Annotated[
            SigV4Form,
            Meta(
                description="AWS Signature Version 4: a request that the guest signed with the placeholder as its "
                "access key is signed again with the real one, for this region and service only. The value is "
                "ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN], or JSON as of an AWS credential_process"
            ),
        ]
        | None
    ) = None
    oauth2: OAuth2Form | None = None
    hmac: Annotated[HmacForm, Meta(description="Signs the body with the value as the key (HMAC-SHA256)")] | None = None
    body: BodyForm | None = None
    mtls: MtlsForm | None = None
    postgres: PostgresForm | None = None
    mysql: MysqlForm | None = None


class InjectRule(Struct, frozen=True, kw_only=True):
    as_: InjectAs = field(name="as")
    hosts: Annotated[
        tuple[str, ...] | None, Meta(description="Exact names, or *.x.y for one label; absent: every destination")
    ] = None
    ports: (
        Annotated[
            tuple[Annotated[int, Meta(ge=1, le=65535)], ...],
            Meta(
                min_length=1,
                max_length=16,
                description="TCP ports of the hosts; absent: 443, for postgres 5432, for mysql 3306",
            ),
        ]
        | None
    ) = None
    scrub: Annotated[
        bool | UnsetType,
        Meta(
            description="Replace the value by the placeholder in responses of the hosts, head and body: as it is, and "
            "as JSON, HTML, URLs, forms and base64 have it. The hosts are asked for whole bodies without compression"
        ),
    ] = UNSET


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
    access: Annotated[EgressAccess | UnsetType, Meta(description="Where the instance may go; absent: anywhere")] = UNSET


class EgressCheck(Struct, frozen=True, kw_only=True):
    """What the rules of an instance say of a request, without sending it."""

    method: str
    scheme: Literal["https", "http"]
    host: str
    port: int
    decision: AccessAction
    rule: Annotated[str, Meta(description="Which decided; default: none")]
    reason: Annotated[str, Meta(description="ok, approval_needed, or the code that the guest would get")]
    observed: Annotated[bool, Meta(description="It would be carried all the same: the rules only observe")]
    resolves: Annotated[bool, Meta(description="The guest may look up the host's addresses")]


class EgressProposal(Struct, frozen=True, kw_only=True):
    """The narrowest rules that cover what an instance reached since the server started."""

    requests: Annotated[int, Meta(description="That they cover")]
    complete: Annotated[bool, Meta(description="false: there were too many hosts to remember all")]
    default: AccessDefault
    rules: tuple[AccessRule, ...]


class EgressApproval(Struct, frozen=True, kw_only=True):
    """Requests that wait until someone approves or denies them."""

    id: str
    instance_id: str
    rule: Annotated[str, Meta(description="Which asks")]
    scheme: Literal["https", "http"]
    host: str
    port: int
    method: str
    path: Annotated[str, Meta(description="Without query; may be cut")]
    waiting: Annotated[int, Meta(description="Requests")]
    since: Timestamp
    expires_at: Annotated[Timestamp, Meta(description="Then they are refused, unless more come")]


class EgressDecision(Struct, frozen=True, kw_only=True):
    """A decision about an approval."""

    for_: Annotated[
        Duration | None,
        Meta(
            description="Also about requests to come that this rule asks about, to this host and port, for so long; "
            "absent: only about those that wait"
        ),
    ] = field(name="for", default=None)


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
    http: Annotated[int, Meta(description="Major version of HTTP that the guest used; 0: a login to a database")]
    decision: Annotated[
        Ruling | UnsetType,
        Meta(description="Of the instance's rules, if it has any; observed: would be denied; held: not approved"),
    ] = UNSET
    rule: Annotated[str | UnsetType, Meta(description="Which rule decided; default: none")] = UNSET
    target: Annotated[
        str | UnsetType, Meta(description="Path, and query, where the rule has them recorded; may be cut")
    ] = UNSET
