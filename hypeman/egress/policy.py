"""Compiles credentials and secrets into the rules that the data plane applies. Pure.

A credential is a name that the guest sees, the source of the real value, and rules for which hosts get it in which
form (transforms.py). Compiling rejects everything that would otherwise fail on a request:

- hosts are plain names in one spelling, exact or ``*.x.y`` for exactly one label (not ``x.y``, not ``a.b.x.y``);
- no two rules may set the same header or parameter of the same host: which credential is sent would be undefined;
- message framing and hop-by-hop headers cannot be set;
- a value cannot contain bytes that end a header.

No error, repr or log line contains a value. The compiled format is defined in `ext/egress/policy.c`; the caller
wipes the snapshot after handing it over.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from hypeman.egress.transforms import Kind, Value, encode_text, form_of
from hypeman.egress.types import CredentialPolicy, InjectRule
from hypeman.errors import InvalidRequest

MAX_RULES = 256
MAX_RULES_PER_HOST = 16
_EVERY_HOST = ""
MAX_PORTS = 16
MAX_SCRUB_RULES = 32
"""As in ext/egress/verdict.h."""
MAX_SCRUBBED_NAME = 64
"""So that a response does not become many times as long."""
HTTPS = 443
POSTGRES = 5432
MYSQL = 3306
WEB_PORTS = frozenset((80, HTTPS))
"""Ports that are the data plane's for every instance with egress."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class Unmatched(enum.IntEnum):
    """How to treat a host that no rule names."""

    PASS = 0
    """Passed through without being decrypted."""
    INSPECT = 1
    """Decrypted and recorded, nothing added; IP addresses instead of names are refused."""
    DENY = 2


class HostPattern(str):
    """A canonical host name, or ``*.`` and one."""

    __slots__ = ()

    @property
    def wildcard(self) -> bool:
        return self.startswith("*.")

    @property
    def name(self) -> str:
        return self.removeprefix("*.")

    def covers(self, name: str) -> bool:
        """Whether the pattern matches the host ``name`` (canonical)."""
        return name.partition(".")[2] == self.name if self.wildcard else name == self

    def overlaps(self, other: HostPattern) -> bool:
        if self.wildcard == other.wildcard:
            return self == other
        return self.covers(other) if self.wildcard else other.covers(self)


def placeholder(key: str) -> str:
    """What the guest sees instead of the value of credential ``key``."""
    return f"mock-{key}"


def parse_host(text: str) -> HostPattern:
    """The canonical form of a host in a rule. Raises InvalidRequest with the reason."""
    name = text.lower().removesuffix(".")
    wildcard = name.startswith("*.")
    labels = name.removeprefix("*.").split(".")
    if not text.isascii():
        raise InvalidRequest(f"host {text!r} must be written in its ASCII form (xn--…)")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidRequest(f"host {text!r} must be a name such as api.example.com or *.example.com")
    if _NUMBER.fullmatch(labels[-1]):
        raise InvalidRequest(f"host {text!r} is an address; credentials are bound to names")
    if wildcard and len(labels) < 2:
        raise InvalidRequest(f"host {text!r} covers a whole top-level domain; name at least *.example.com")
    return HostPattern(name)


def parse_hosts(rule: InjectRule) -> tuple[HostPattern, ...] | None:
    """The hosts of a rule; None for every host."""
    if rule.hosts is None:
        return None
    if not rule.hosts:
        raise InvalidRequest("hosts is an empty list; leave it out to mean every host")
    return tuple(parse_host(host) for host in rule.hosts)


def parse_ports(rule: InjectRule, usual_port: int = HTTPS) -> tuple[int, ...]:
    """The TCP ports of a rule."""
    if rule.ports is None:
        return (POSTGRES if rule.as_.postgres is not None else MYSQL if rule.as_.mysql is not None else usual_port,)
    if not 0 < len(rule.ports) <= MAX_PORTS or any(not 0 < port < 65536 for port in rule.ports):
        raise InvalidRequest(f"ports must be 1 to {MAX_PORTS} numbers from 1 to 65535; leave it out to mean 443")
    if _is_login(rule) and WEB_PORTS & set(rule.ports):
        raise InvalidRequest("ports 80 and 443 are for HTTP; a rule as postgres or mysql needs another one")
    return rule.ports


def _is_login(rule: InjectRule) -> bool:
    return rule.as_.postgres is not None or rule.as_.mysql is not None


def logs_in_to_postgres(credentials: Mapping[str, CredentialPolicy]) -> bool:
    return any(rule.as_.postgres is not None for policy in credentials.values() for rule in policy.inject)


def redirected_ports(credentials: Mapping[str, CredentialPolicy]) -> tuple[int, ...]:
    """TCP ports beside 80 and 443 that the data plane serves for an instance with these credentials."""
    rules = (rule for policy in credentials.values() for rule in policy.inject if _is_login(rule))
    return tuple(sorted({port for rule in rules for port in parse_ports(rule)}))


class _Rule:
    """One use of a credential for one set of hosts, checked."""

    def __init__(self, key: str, number: int, rule: InjectRule, usual_port: int) -> None:
        self.key = key
        self.token = token_name(key, number) if rule.as_.oauth2 is not None else None
        self.form = form_of(rule.as_, placeholder(key))
        self.scrub = rule.scrub is True
        if self.scrub and self.form.kind is Kind.MTLS:
            raise InvalidRequest("mtls shows the host nothing that it could show the guest; leave out scrub")
        if _is_login(rule) and (self.scrub or rule.hosts is None):
            raise InvalidRequest(f"a rule as {self.form.name} needs hosts, and cannot scrub")
        if self.scrub and len(key) > MAX_SCRUBBED_NAME:
            raise InvalidRequest(f"a credential that is scrubbed has a name of at most {MAX_SCRUBBED_NAME} characters")
        self.hosts = parse_hosts(rule)
        self.ports = parse_ports(rule, usual_port)

    def clashes(self, other: _Rule) -> bool:
        if self.form.kind is Kind.BODY and self.key != other.key:
            return False  # each has its own placeholder
        if self.form.target != other.form.target or not set(self.ports) & set(other.ports):
            return False
        if self.form.scope and other.form.scope and (self.form.scope != other.form.scope or self.key != other.key):
            return False  # the guest says which of them it means
        if self.hosts is None or other.hosts is None:
            return True
        return any(mine.overlaps(its) for mine in self.hosts for its in other.hosts)


def _rules(credentials: Mapping[str, CredentialPolicy], usual_port: int) -> Iterator[_Rule]:
    for key, policy in credentials.items():
        if not _TOKEN.fullmatch(key):
            raise InvalidRequest(f"credential {key!r} must be named like an environment variable")
        if (policy.source.env is None) == (policy.source.named is None):
            raise InvalidRequest(f"credential {key!r} must have exactly one source")
        if not policy.inject:
            raise InvalidRequest(f"credential {key!r} has no inject rule")
        for number, rule in enumerate(policy.inject):
            yield _Rule(key, number, rule, usual_port)


def _check_ports_of_mysql(rules: Sequence[_Rule]) -> None:
    """Servers of MySQL speak first, so nothing else can be told from it at the same port."""
    ports = {port for rule in rules if rule.form.kind is Kind.MYSQL for port in rule.ports}
    for rule in rules:
        if rule.form.kind is not Kind.MYSQL and (shared := ports & set(rule.ports)):
            raise InvalidRequest(
                f"port {min(shared)} is for mysql; credential {rule.key!r} cannot use it in another form"
            )


def _most_for_one_host(rules: Sequence[_Rule]) -> int:
    """How many rules the data plane may have to apply to one request."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for number, rule in enumerate(rules):
        for pattern, port in product(rule.hosts or (_EVERY_HOST,), rule.ports):
            numbers.setdefault((pattern, port), set()).add(number)

    def applied(pattern: str, port: int) -> int:
        covering = (pattern, f"*.{pattern.partition('.')[2]}", _EVERY_HOST)
        return len(set[int]().union(*(numbers.get((each, port), ()) for each in covering)))

    return max((applied(pattern, port) for pattern, port in numbers), default=0)


def check_credentials(credentials: Mapping[str, CredentialPolicy], env: Mapping[str, str]) -> None:
    """Raises InvalidRequest unless the credentials are valid with the values in ``env``."""
    compile_policy(credentials, secrets_of(credentials, env))


def sources_of(credentials: Mapping[str, CredentialPolicy]) -> set[str]:
    """The keys of a request's ``env`` that hold real values."""
    return {policy.source.env for policy in credentials.values() if policy.source.env is not None}


def secrets_of(credentials: Mapping[str, CredentialPolicy], env: Mapping[str, str]) -> dict[str, str]:
    """The entries of a request's ``env`` that are real credential values."""
    secrets = {}
    for key, policy in credentials.items():
        name = policy.source.env
        if name is None:
            continue
        if name not in env:
            raise InvalidRequest(f"credential {key!r} takes its value from env {name!r}, which is not given")
        secrets[name] = env[name]
    return secrets


def guest_environment(credentials: Mapping[str, CredentialPolicy], env: Mapping[str, str]) -> dict[str, str]:
    """What the guest sees: ``env`` without real values, and a placeholder for each credential."""
    hidden = sources_of(credentials)
    visible = {name: value for name, value in env.items() if name not in hidden}
    seen = visible | {key: placeholder(key) for key in credentials}
    signing = [key for key, policy in credentials.items() if any(rule.as_.sigv4 for rule in policy.inject)]
    if signing:  # what the AWS SDKs look for
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            seen.setdefault(name, placeholder(signing[0]))
    return seen


def rotate(
    credentials: Mapping[str, CredentialPolicy], secrets: Mapping[str, str], changes: Mapping[str, str]
) -> dict[str, str]:
    """``secrets`` with ``changes`` merged in (PATCH env); only source keys of credentials may change."""
    sources = sources_of(credentials)
    for name in changes:
        if name not in sources:
            raise InvalidRequest(f"env {name!r} is not the source of a credential of this instance")
    merged = {**secrets, **changes}
    compile_policy(credentials, merged)
    return merged


def token_name(key: str, number: int) -> str:
    """Name of the access token for inject rule ``number`` of credential ``key``, among obtained values."""
    return f"{key}/{number}"


def _value_of(
    rule: _Rule, policy: CredentialPolicy, secrets: Mapping[str, str], obtained: Mapping[str, Value]
) -> Value | None:
    """None: the server has not obtained it yet."""
    key = rule.key
    if rule.token is not None:
        return obtained.get(rule.token)
    if policy.source.env is None:
        return obtained.get(key)
    secret = secrets.get(policy.source.env)
    if secret is None:
        raise InvalidRequest(f"the real value of credential {key!r} is not known")
    return Value(secret)


def compile_policy(
    credentials: Mapping[str, CredentialPolicy],
    secrets: Mapping[str, str],
    unmatched: Unmatched = Unmatched.PASS,
    *,
    obtained: Mapping[str, Value] | None = None,
    web_only: bool = False,
    usual_port: int = HTTPS,
    access: bytes = b"",
) -> bytearray:
    """The snapshot for the data plane. It contains the real values: wipe it after handing it over.

    ``obtained``: values that the server obtains, by credential, or by ``token_name``; requests that need one that is
    missing are held by the data plane.
    ``web_only``: the proxy is the guest's only TCP egress, so it forwards HTTPS to ``usual_port``, HTTP to 80, other
    ports only if a rule names them, and TLS only with a server name. ``access``: see rules.compile_access.
    """
    rules = list(_rules(credentials, usual_port))
    if len(rules) > MAX_RULES:
        raise InvalidRequest(f"{len(rules)} inject rules given, at most {MAX_RULES} are allowed")
    for number, rule in enumerate(rules):
        for other in rules[:number]:
            if rule.clashes(other):
                raise InvalidRequest(
                    f"credentials {other.key!r} and {rule.key!r} both set {rule.form.shown} of the same host"
                )
    _check_ports_of_mysql(rules)
    if (most := _most_for_one_host(rules)) > MAX_RULES_PER_HOST:
        raise InvalidRequest(f"{most} inject rules are for the same host, at most {MAX_RULES_PER_HOST} are allowed")
    compiled: list[tuple[_Rule, bytes]] = []
    for rule in rules:
        value = _value_of(rule, credentials[rule.key], secrets, obtained or {})
        compiled.append((rule, rule.form.compile(value)))
        if rule.scrub:
            compiled += [(rule, scrubbing) for scrubbing in rule.form.compile_scrubbing(value)]
    if len(compiled) > min(len(rules) + MAX_SCRUB_RULES, MAX_RULES):
        raise InvalidRequest("too many values are to be scrubbed")
    patterns = sum(len(rule.hosts or ()) for rule, _ in compiled)
    out = bytearray(b"HEG3" + struct.pack("<BBHHH", unmatched, web_only, usual_port, len(compiled), patterns))
    for rule, form in compiled:
        out += encode_text(rule.key) + encode_text(placeholder(rule.key)) + form
        out += struct.pack(f"<BB{len(rule.ports)}H", rule.hosts is None, len(rule.ports), *rule.ports)
        out += struct.pack("<H", len(rule.hosts or ()))
        for host in rule.hosts or ():
            out += struct.pack("<B", host.wildcard) + encode_text(host.name)
    return out + access


def wipe(data: bytearray) -> None:
    """Zeroes a compiled snapshot."""
    data[:] = bytes(len(data))
