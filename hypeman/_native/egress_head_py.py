"""Python reference for the data plane's processing of one HTTP/1 request head: the tests compare the C with it.

Not used at run time (a proxy in Python costs at least eight times nginx). The order matters: parse strictly, find
the single destination, apply the rules, drop hop-by-hop headers, and only then add the credential, so that a guest
cannot remove it by listing it in Connection.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_HEAD = 32 * 1024
MAX_FIELDS = 128

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_TARGET = rb"[\x21\x22\x24-\x7e]"
_VALUE = rb"[\t\x20-\x7e\x80-\xff]"
_HEAD = re.compile(
    rb"(?P<method>%b{1,32}) (?P<target>%b+) HTTP/1\.(?P<minor>[01])\r\n(?P<fields>(?:%b+:%b*\r\n)*)\r\n"
    % (_TOKEN, _TARGET, _TOKEN, _VALUE)
)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")

CONNECTION_FIELDS = frozenset(
    ("connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "upgrade", "transfer-encoding",
     "content-length", "host", "http2-settings")
)  # fmt: skip
"""Dropped: hop-by-hop, or rewritten."""


HOP_COUNTED = frozenset(("options", "trace"))


class Refused(Exception):  # a verdict, not an error
    """The reason returned to the guest."""


class Rule(NamedTuple):
    """One header for some hosts; ``hosts`` None matches every name. Patterns are canonical."""

    placeholder: str
    header: str
    value: str
    hosts: tuple[str, ...] | None
    ports: tuple[int, ...] = (443,)

    def covers(self, host: str, port: int) -> bool:
        if is_address(host) or port not in self.ports:
            return False
        return self.hosts is None or any(
            pattern == host or (pattern.startswith("*.") and pattern[2:] == host.partition(".")[2])
            for pattern in self.hosts
        )


class Origin(NamedTuple):
    """The connection that carried the head: TLS for a name, or plain HTTP, as a proxy or redirected."""

    tls_name: str | None
    explicit_proxy: bool
    port: int


class Head(NamedTuple):
    method: str
    target: str
    minor: int
    fields: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [value for field, value in self.fields if field.lower() == name]

    def options(self) -> set[str]:
        """The options listed in Connection."""
        return {item.strip(" \t").lower() for value in self.all("connection") for item in value.split(",")}


def parse_head(data: bytes) -> Head:
    """The head at the start of ``data``, which must contain all of it."""
    match = _HEAD.match(data)
    if match is None:
        raise Refused("bad_request")
    lines = match["fields"].decode("latin-1").split("\r\n")[:-1]
    if match.end() > MAX_HEAD or len(lines) > MAX_FIELDS:
        raise Refused("head_too_large")
    fields = [(name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]
    head = Head(match["method"].decode(), match["target"].decode("latin-1"), int(match["minor"]), fields)
    _check_framing(head)
    return head


def _check_framing(head: Head) -> None:
    lengths, codings, hosts = head.all("content-length"), head.all("transfer-encoding"), head.all("host")
    if len(lengths) > 1 or any(not re.fullmatch("[0-9]{1,18}", length) for length in lengths):
        raise Refused("bad_request")
    if codings and (len(codings) > 1 or codings[0].lower() != "chunked" or lengths or head.minor == 0):
        raise Refused("bad_request")
    if len(hosts) > 1 or (head.minor == 1 and not hosts):
        raise Refused("bad_request")
    if any(option and not re.fullmatch(_TOKEN.decode() + "+", option) for option in head.options()):
        raise Refused("bad_request")


def is_address(host: str) -> bool:
    return ":" in host or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]) is not None


def canonical_host(text: str) -> str:
    """The canonical form of a host. Raises Refused if it is neither a plain name nor an address."""
    host = text.lower().removesuffix(".")
    if len(host) > 253 or len(text) > 254 or not all(_LABEL.fullmatch(label) for label in host.split(".")):
        raise Refused("bad_host")
    if is_address(host):
        try:
            if str(ipaddress.IPv4Address(host)) != host:
                raise Refused("bad_host")
        except ValueError:
            raise Refused("bad_host") from None
    return host


def parse_authority(text: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[]*))(?::([0-9]{1,5}))?", text)
    if match is None:
        raise Refused("bad_host")
    port = int(match[3]) if match[3] else None
    if port is not None and not 0 < port < 65536:
        raise Refused("bad_host")
    if match[1] is None:
        return canonical_host(match[2]), port
    try:
        if "%" in match[1]:
            raise Refused("bad_host")
        return str(ipaddress.IPv6Address(match[1])), port
    except ValueError:
        raise Refused("bad_host") from None


def find_destination(head: Head, origin: Origin) -> tuple[str, int, str]:
    """Host, port and path of the request."""
    if head.method.lower() == "connect":
        raise Refused("method_not_allowed")
    named, path = None, head.target
    hosts = head.all("host")
    if not path.startswith("/"):
        scheme = "https://" if origin.tls_name else "http://"
        if not (path == "*" and head.method.lower() == "options"):
            if not path.lower().startswith(scheme):
                raise Refused("bad_request")
            named, path = re.fullmatch(r"([^/?]*)(.*)", path[len(scheme) :]).groups()  # type: ignore[union-attr]
            path = path or ("*" if head.method.lower() == "options" else "/")
            if not named:
                raise Refused("bad_request")
            path = f"/{path}" if path.startswith("?") else path
    elif origin.tls_name is None and origin.explicit_proxy:
        raise Refused("bad_request")
    if named is None and not hosts:
        if origin.tls_name is None:
            raise Refused("bad_request")
        return canonical_host(origin.tls_name), origin.port, path
    host, port = parse_authority(named if named is not None else hosts[0])
    if origin.tls_name is not None:
        if host != canonical_host(origin.tls_name) or port not in (None, origin.port):
            raise Refused("host_mismatch")
        return host, origin.port, path
    if not origin.explicit_proxy:
        if port not in (None, origin.port):
            raise Refused("host_mismatch")
        return host, origin.port, path
    return host, port or 80, path


def apply_rules(head: Head, host: str, port: int, tls: bool, rules: tuple[Rule, ...]) -> list[Rule]:
    """The rules that add a header to this request."""
    matched = [rule for rule in rules if tls and rule.covers(host, port)]
    here = {rule.placeholder for rule in matched}
    for rule in rules:
        if rule.placeholder not in here and any(rule.placeholder in value for _, value in head.fields):
            raise Refused("placeholder_outside_hosts")
    if matched and head.method.lower() == "trace":
        raise Refused("method_not_allowed")
    return matched


def _kept(head: Head, matched: list[Rule]) -> Iterator[tuple[str, str]]:
    dropped = CONNECTION_FIELDS | head.options()
    variables = {rule.header.replace("_", "-") for rule in matched}
    if matched:
        dropped |= {"authorization", "cookie"}
    if head.minor == 0:
        dropped |= {"expect"}
    if head.method.lower() in HOP_COUNTED:
        dropped |= {"max-forwards"}
    kept = ((name, value) for name, value in head.fields if name.lower() not in dropped)
    return ((name, value) for name, value in kept if name.lower().replace("_", "-") not in variables)


def _upgrade(head: Head) -> str | None:
    """The protocol to upgrade to, if permitted: h2c would bypass all checks made here."""
    wanted = head.all("upgrade")
    framed = head.all("transfer-encoding") or int((head.all("content-length") or ["0"])[0])
    if "upgrade" not in head.options() or head.minor == 0 or framed or len(wanted) != 1:
        return None
    protocols = {item.strip(" \t").lower() for item in wanted[0].split(",")}
    return None if protocols & {"h2c", "h2"} else wanted[0]


def _hops(head: Head) -> int | None:
    """Max-Forwards, for the methods that use it. Raises Refused at 0."""
    found = head.all("max-forwards")
    if head.method.lower() not in HOP_COUNTED or not found:
        return None
    if not re.fullmatch("[0-9]{1,18}", found[0]):
        raise Refused("bad_request")
    if int(found[0]) == 0:
        raise Refused("method_not_allowed" if head.method.lower() == "trace" else "max_forwards")
    return int(found[0])


def _body_is_undefined(head: Head) -> bool:
    """Whether there is a body that the host may leave unread, since the method does not define one."""
    carries = head.all("transfer-encoding") or int((head.all("content-length") or ["0"])[0])
    return bool(carries) and head.method.lower() not in ("post", "put", "patch")


def rewrite_head(data: bytes, rules: tuple[Rule, ...], origin: Origin) -> bytes:
    """The head as sent to the host. Raises Refused with the reason."""
    head = parse_head(data)
    host, port, path = find_destination(head, origin)
    if any(value.lower() != "100-continue" for value in head.all("expect")):
        raise Refused("expectation_failed")
    tls = origin.tls_name is not None
    hops = _hops(head)
    matched = apply_rules(head, host, port, tls, rules)
    authority = f"[{host}]" if ":" in host else host
    if port != (443 if tls else 80):
        authority += f":{port}"
    lines = [f"{head.method} {path} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in _kept(head, matched)]
    if hops is not None:
        lines.append(f"Max-Forwards: {hops - 1}")
    lines.append(f"Via: 1.{head.minor} hypeman")
    close = _body_is_undefined(head)
    upgrade = _upgrade(head)
    names = [name for name, _ in head.fields if name.lower() == "upgrade"]
    if upgrade is not None:
        lines += [f"{names[0]}: {upgrade}", "Connection: upgrade"]
    elif any("trailers" in (item.strip(" \t").lower() for item in value.split(",")) for value in head.all("te")):
        lines += ["TE: trailers", "Connection: TE, close" if close else "Connection: TE"]
    elif close:
        lines.append("Connection: close")
    if head.all("transfer-encoding"):
        lines.append("Transfer-Encoding: chunked")
    elif lengths := head.all("content-length"):
        lines.append(f"Content-Length: {int(lengths[0])}")
    lines += [f"{rule.header}: {rule.value}" for rule in matched]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
