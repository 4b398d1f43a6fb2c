"""Which destinations an instance may reach: check rules, decide about requests, compile them for the data plane. Pure.

Rules are ordered; the first that matches decides, else the default. A rule matches if its hosts, ports, methods and
paths all do, and an absent field matches everything. ``decide`` is the reference for ``ext/egress/access.c``, with
which ``tests/egress/test_rules.py`` compares it; the API's check uses it.

Rules with ``networks`` are for traffic that no proxy reads (TCP except ports 80 and 443, UDP except 443). They become
elements of the host's firewall and only matter where the default is ``deny``.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Iterable, Iterator, Sequence, Set
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from hypeman.egress.policy import WEB_PORTS, HostPattern, parse_host
from hypeman.egress.types import (
    AccessAction,
    AccessDefault,
    AccessRecord,
    AccessRule,
    EgressAccess,
    EgressCheck,
    PrivateNetworks,
)
from hypeman.errors import InvalidRequest

MAX_RULES = 1000
MAX_NAMES = 16_384
"""Hosts, methods and paths of all rules."""
MAX_NETWORKS = 256
"""Networks times ports of all rules."""
MAX_PATH = 1024
DEFAULT = "default"
"""What errors and records call the default."""
OVERRIDES = frozenset(("x-http-method-override", "x-http-method", "x-method-override"))
"""Headers that make some servers use another method than the request's."""

_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_PATH = re.compile(r"/[\x21-\x22\x24-\x3e\x40-\x5b\x5d-\x7e]*")
_UNRESERVED = re.compile(r"[A-Za-z0-9_~-]")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_SUFFIX = "**."
_OBSERVED = ("no_rule", "host_denied_by_rule", "request_denied", "ambiguous_path", "method_override", "approval_needed")
_ACTIONS = {AccessAction.ALLOW: 0, AccessAction.DENY: 1, AccessAction.ASK: 2}
_PRIVATE = {None: 0, PrivateNetworks.OPEN: 1, PrivateNetworks.CLOSED: 2}
_RECORDS = {AccessRecord.HOST: 0, AccessRecord.PATH: 1, AccessRecord.QUERY: 2}


class Opening(msgspec.Struct, frozen=True):
    """Raw traffic that the firewall lets through."""

    protocol: str
    """``tcp`` or ``udp``."""
    network: str
    """address/prefix"""
    first: int
    last: int
    """Ports."""


class AccessRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as rules see it."""

    host: str
    """Canonical name or address."""
    port: int
    method: str = "GET"
    target: str = "/"
    """Path as sent, with query."""
    override: bool = False
    """It has one of the headers in OVERRIDES."""


class Decision(msgspec.Struct, frozen=True):
    action: AccessAction
    rule: str
    """Name of the rule that decided, or DEFAULT."""
    reason: str
    """``ok``, or the code that the guest gets."""


# ── Checking ─────────────────────────────────────────────────────────────────────────────────────


def check_access(access: EgressAccess, redirected: Iterable[int] = ()) -> EgressAccess:
    """``access`` with hosts, methods and paths in their canonical form. Raises InvalidRequest.

    ``redirected``: TCP ports that are the proxy's beside those of HTTP, see ``policy.redirected_ports``.
    """
    reserved = WEB_PORTS | set(redirected)
    if len(access.rules) > MAX_RULES:
        raise InvalidRequest(f"{len(access.rules)} rules given, at most {MAX_RULES} are allowed")
    rules = []
    for number, rule in enumerate(access.rules, 1):
        try:
            rules.append(_checked(rule, reserved))
        except InvalidRequest as error:
            raise InvalidRequest(f"network.egress.rules: rule {number}: {error.message}") from None
    names: set[str] = set()
    for number, rule in enumerate(rules, 1):
        if rule.name is not None and rule.name in names:
            raise InvalidRequest(f"network.egress.rules: rule {number}: another rule is named {rule.name!r}")
        names.add(rule.name or "")
    if sum(len(rule.hosts or ()) + len(rule.methods or ()) + len(rule.paths or ()) for rule in rules) > MAX_NAMES:
        raise InvalidRequest(f"network.egress.rules: over {MAX_NAMES} hosts, methods and paths in all")
    checked = msgspec.structs.replace(access, rules=tuple(rules))
    if sum(1 for _ in openings(checked)) > MAX_NETWORKS:
        raise InvalidRequest(f"network.egress.rules: over {MAX_NETWORKS} pairs of networks and ports in all")
    _check_overlaps(checked)
    return checked


def _checked(rule: AccessRule, reserved: Set[int]) -> AccessRule:
    """``reserved``: TCP ports of the proxy."""
    if rule.networks is not None:
        return _checked_networks(rule, reserved)
    if rule.protocol is not None:
        raise InvalidRequest("protocol is only for rules with networks; rules with hosts apply to HTTP and TLS")
    for field in ("hosts", "ports", "methods", "paths"):
        if getattr(rule, field) == ():
            raise InvalidRequest(f"{field} is an empty list; leave it out to mean all")
    return msgspec.structs.replace(
        rule,
        hosts=tuple(parse_access_host(host) for host in rule.hosts) if rule.hosts is not None else None,
        methods=tuple(_parse_method(method) for method in rule.methods) if rule.methods is not None else None,
        paths=tuple(_parse_path(path) for path in rule.paths) if rule.paths is not None else None,
    )


def _checked_networks(rule: AccessRule, reserved_tcp: Set[int]) -> AccessRule:
    if rule.hosts is not None or rule.methods is not None or rule.paths is not None:
        raise InvalidRequest("networks cannot be combined with hosts, methods and paths")
    if rule.action is not AccessAction.ALLOW or rule.until is not None:
        raise InvalidRequest("rules with networks can only allow, without until; the default closes everything else")
    if not rule.networks or not rule.ports:
        raise InvalidRequest("rules with networks need at least one network, and ports")
    protocol = rule.protocol or "tcp"
    reserved = reserved_tcp if protocol == "tcp" else {443}
    if reserved & set(rule.ports):
        raise InvalidRequest(f"{protocol} port {min(reserved & set(rule.ports))} belongs to the proxy; name hosts")
    networks = []
    for text in rule.networks:
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            raise InvalidRequest(f"network {text!r} must be an IPv4 address/prefix such as 203.0.113.0/24") from None
        if network.version != 4:
            raise InvalidRequest(f"network {text!r}: guests have no IPv6")
        networks.append(str(network))
    return msgspec.structs.replace(rule, networks=tuple(networks), protocol=protocol)


def _check_overlaps(access: EgressAccess) -> None:
    """The firewall's sets cannot hold elements that overlap."""
    seen: list[tuple[Opening, ipaddress.IPv4Network]] = []
    for opening in openings(access):
        network = ipaddress.IPv4Network(opening.network)
        for other, its in seen:
            ports = opening.first <= other.last and other.first <= opening.last
            if opening.protocol == other.protocol and ports and network.overlaps(its):
                raise InvalidRequest(
                    f"network.egress.rules: {network} and {its} overlap on {opening.protocol} port {opening.first}"
                )
        seen.append((opening, network))


def parse_access_host(text: str) -> str:
    """The canonical form of a host in a rule: a name, an IP address, ``*.x.y`` (one label more) or ``**.x.y`` (one or
    more). Raises InvalidRequest."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    if text.startswith(_SUFFIX):
        return _SUFFIX + parse_host("*." + text.removeprefix(_SUFFIX)).name
    return str(parse_host(text))


def _parse_method(text: str) -> str:
    if not _METHOD.fullmatch(text) or text.upper() == "CONNECT":
        raise InvalidRequest(f"method {text!r} is not a valid method name")
    return text.upper()


def _parse_path(text: str) -> str:
    if len(text) > MAX_PATH or not _PATH.fullmatch(text):
        raise InvalidRequest(f"path {text!r} must begin with / and have at most {MAX_PATH} visible ASCII characters")
    for place in re.finditer(r"\*", text):
        segment = text[place.start() - 1] == "/" and text[place.end() : place.end() + 1] in ("", "/")
        if not segment and place.end() != len(text):
            raise InvalidRequest(f"path {text!r}: * stands for a whole segment, or at the end for anything")
    path = canonical_path(text)
    if path is None:
        raise InvalidRequest(f"path {text!r} is ambiguous: no //, . or .. segments, and no encoded / or .")
    return path


# ── Deciding ─────────────────────────────────────────────────────────────────────────────────────


def canonical_path(target: str) -> str | None:
    """The path without query, in one spelling; None if servers could read it in different ways."""
    path = target.partition("?")[0]
    if not path:
        return "/"
    if not path.startswith("/"):
        return path
    odd = False

    def replace(match: re.Match[str]) -> str:
        nonlocal odd
        code = int(match[1], 16) if match[1] else 0
        odd = odd or code < 0x20 or code == 0x7F or chr(code) in "/\\%."
        return chr(code) if _UNRESERVED.fullmatch(chr(code)) else match[0].upper()

    odd = "\\" in path
    path = _ESCAPE.sub(replace, path)
    *segments, last = path.split("/")[1:]
    odd = odd or "" in segments or any(_without_parameters(each) in (".", "..") for each in (*segments, last))
    return None if odd else path


def path_matches(pattern: str, path: str) -> bool:
    """Both canonical."""
    parts = [re.escape(part) for part in pattern.split("*")]
    if pattern.endswith("*"):
        return re.fullmatch("[^/]+".join(parts[:-1]) + ".*", path, re.DOTALL) is not None
    return re.fullmatch("[^/]+".join(parts), path, re.DOTALL) is not None


def _without_parameters(segment: str) -> str:
    return re.split(";|%3B", segment, maxsplit=1)[0]


def loose_path(path: str) -> str:
    """A canonical path as a server may read it that knows parameters of segments (``;``, also encoded) and no case."""
    segments = [_without_parameters(each) for each in path.split("/")]
    return re.sub("/+", "/", "/".join(segments)).lower()


def _without_slash(path: str) -> str:
    return path.removesuffix("/") or path


def rule_matches_path(rule: AccessRule, path: str) -> bool:
    """A rule that denies or asks matches every reading of the path; one that allows, only the path as it is written."""
    loose = loose_path(path)
    for pattern in rule.paths or ():
        if path_matches(pattern, path):
            return True
        small = pattern.lower()
        if rule.action is not AccessAction.ALLOW and (
            path_matches(small, loose) or path_matches(_without_slash(small), _without_slash(loose))
        ):
            return True
    return False


def host_matches(pattern: str, host: str) -> bool:
    """Both canonical."""
    if pattern.startswith(_SUFFIX):
        return host.endswith(pattern.removeprefix("**")) and not is_address(host)
    return HostPattern(pattern).covers(host) if not is_address(host) else pattern == host


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def rule_name(rule: AccessRule, number: int) -> str:
    """What errors and records call the rule at position ``number``, from 1."""
    return rule.name if rule.name is not None else f"#{number}"


def decide(access: EgressAccess, request: AccessRequest, now: datetime) -> Decision:
    """What happens to a request: the first rule that matches, else the default.

    Refused instead: a path that servers could read in two ways, if a rule on paths has to decide; a header that
    replaces the method, if a rule on methods had a say.
    """
    has_method, path = False, canonical_path(request.target)
    found = AccessAction(access.default.value), DEFAULT, False, False
    for number, rule in _covering(access, request.host, request.port, now):
        has_method = has_method or rule.methods is not None
        if rule.methods is not None and request.method.upper() not in rule.methods:
            continue
        ambiguous = rule.paths is not None and path is None
        if rule.paths is None or ambiguous or rule_matches_path(rule, path or ""):
            narrow = rule.paths is not None or rule.methods is not None
            found = (rule.action, rule_name(rule, number), ambiguous, narrow)
            break
    action, name, ambiguous, narrow = found
    if ambiguous:
        return Decision(AccessAction.DENY, name, "ambiguous_path")
    if action is AccessAction.DENY:
        if name == DEFAULT:
            return Decision(action, name, "no_rule")
        return Decision(action, name, "request_denied" if narrow else "host_denied_by_rule")
    if has_method and request.override:
        return Decision(AccessAction.DENY, name, "method_override")
    return Decision(action, name, "ok" if action is AccessAction.ALLOW else "approval_needed")


def check_url(access: EgressAccess | None, url: str, method: str, now: datetime, *, web_only: bool) -> EgressCheck:
    """What would happen to a request, without sending it. Raises InvalidRequest if ``url`` is none of http or https.

    ``web_only``: see compile_policy.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = parse_access_host(parts.hostname or "")
    except (ValueError, InvalidRequest):
        raise InvalidRequest(f"url {url!r} must be a URL such as https://api.example.com/v1/models") from None
    scheme: Literal["https", "http"] = "https" if parts.scheme == "https" else "http"
    if parts.scheme not in ("http", "https") or "*" in host or parts.username is not None:
        raise InvalidRequest(f"url {url!r} must be http or https, for one host, without a user name")
    given = access or EgressAccess()
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    found = decide(given, AccessRequest(host=host, port=port, method=_parse_method(method), target=target), now)
    usual = port == (443 if scheme == "https" else 80)
    if found.action is not AccessAction.DENY and web_only and not usual and not _names_port(given, host, port, now):
        found = Decision(AccessAction.DENY, DEFAULT, "port_denied")
    if found.action is not AccessAction.DENY and web_only and scheme == "https" and is_address(host):
        found = Decision(AccessAction.DENY, DEFAULT, "address_literal")
    return EgressCheck(
        method=_parse_method(method),
        scheme=scheme,
        host=host,
        port=port,
        decision=found.action,
        rule=found.rule,
        reason=found.reason,
        observed=given.observe and found.reason in _OBSERVED,
        resolves=not given.closes or may_resolve(given, host, now),
    )


def _names_port(access: EgressAccess, host: str, port: int, now: datetime) -> bool:
    first = next(_covering(access, host, port, now), None)
    return first is not None and first[1].ports is not None and first[1].action is not AccessAction.DENY


def may_resolve(access: EgressAccess, name: str, now: datetime) -> bool:
    """Whether some request to the host ``name`` (canonical) can be allowed, so that its addresses may be looked up."""
    for rule in access.rules:
        if not _applies(rule, now) or not _covers_host(rule, name):
            continue
        if rule.action is not AccessAction.DENY:
            return True
        if rule.ports is None and rule.methods is None and rule.paths is None:
            return False
    return access.default is AccessDefault.ALLOW


def _covering(access: EgressAccess, host: str, port: int, now: datetime) -> Iterator[tuple[int, AccessRule]]:
    for number, rule in enumerate(access.rules, 1):
        if _applies(rule, now) and _covers_host(rule, host) and (rule.ports is None or port in rule.ports):
            yield number, rule


def _applies(rule: AccessRule, now: datetime) -> bool:
    return rule.networks is None and (rule.until is None or _seconds(now) < _seconds(rule.until))


def _covers_host(rule: AccessRule, host: str) -> bool:
    return rule.hosts is None or any(host_matches(pattern, host) for pattern in rule.hosts)


def _seconds(time: datetime) -> int:
    return int(time.astimezone(UTC).timestamp())


# ── Compiling ────────────────────────────────────────────────────────────────────────────────────


def openings(access: EgressAccess) -> Iterator[Opening]:
    """What the firewall lets through besides the proxy's traffic."""
    for rule in access.rules:
        for network in rule.networks or ():
            for first, last in _ranges(rule.ports or ()):
                yield Opening(rule.protocol or "tcp", network, first, last)


def _ranges(ports: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for port in sorted(set(ports)):
        if last is None or first is None:
            first = last = port
        elif port == last + 1:
            last = port
        else:
            yield first, last
            first = last = port
    if first is not None and last is not None:
        yield first, last


def _text(value: str) -> bytes:
    data = value.encode("ascii")
    return struct.pack("<H", len(data)) + data


def compile_access(access: EgressAccess | None) -> bytes:
    """The end of a compiled policy: private networks, then what ``ext/egress/access.c`` reads; empty if nothing is
    limited. ``access`` must be checked."""
    if access is None:
        return b""
    limited = bool(access.rules) or access.default is AccessDefault.DENY
    return struct.pack("<BB", _PRIVATE[access.private_networks], limited) + (_compile_rules(access) if limited else b"")


def _compile_rules(access: EgressAccess) -> bytes:
    rules = [(number, rule) for number, rule in enumerate(access.rules, 1) if rule.networks is None]
    names = sum(len(rule.hosts or ()) + len(rule.methods or ()) + len(rule.paths or ()) for _, rule in rules)
    out = bytearray(
        struct.pack("<BBHI", _ACTIONS[AccessAction(access.default.value)], access.observe, len(rules), names)
    )
    for number, rule in rules:
        ports, methods, paths, hosts = (rule.ports or (), rule.methods or (), rule.paths or (), rule.hosts or ())
        until = _seconds(rule.until) if rule.until is not None else 0
        out += _text(rule_name(rule, number))
        out += struct.pack("<BBBq", _ACTIONS[rule.action], _RECORDS[rule.record], rule.hosts is None, until)
        out += struct.pack(f"<B{len(ports)}H", len(ports), *ports)
        out += struct.pack("<B", len(methods)) + b"".join(_text(method.lower()) for method in methods)
        out += struct.pack("<B", len(paths)) + b"".join(_text(path) for path in paths)
        out += struct.pack("<H", len(hosts))
        for host in hosts:
            kind = 2 if host.startswith(_SUFFIX) else 1 if host.startswith("*.") else 0
            out += struct.pack("<B", kind) + _text(host.lstrip("*").removeprefix(".") if kind else host)
    return bytes(out)
