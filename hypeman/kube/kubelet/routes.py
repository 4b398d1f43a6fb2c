"""What a request to the kubelet's API asks for, and what permission it needs. Pure.

The paths and parameters are those that the API server, kubectl (through it) and metrics-server use; the permissions are
those of a kubelet with fine-grained authorization, with one exception: exec, attach and port-forward always need
``create``. A WebSocket is a GET, and ``get`` on ``nodes/proxy``, which monitoring often has, would run programs in all
pods. What this node cannot do is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TypeVar
from urllib.parse import parse_qs, unquote

from msgspec import Struct

from hypeman.errors import InvalidRequest, NotFound, NotSupported

T = TypeVar("T")

_VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_TRUE = frozenset(["1", "true", "True", "t"])
_ALSO = {"pods": "pods", "runningpods": "pods", "healthz": "healthz", "configz": "configz"}
"""First segments whose finer subresource is enough by itself."""
_REACH_IN = frozenset(["exec", "attach", "portForward"])
MAX_PORTS = 128
"""Of one port-forward: each has two channels, whose numbers are bytes."""
MAX_SECONDS = 9 * 10**9
"""Some 285 years: the longest duration that the server reads is 292."""
_OWN = {"stats": "stats", "metrics": "metrics", "logs": "log", "checkpoint": "checkpoint"}


class Container(Struct, frozen=True):
    """Which pod's container; its name is empty where there is none in the path."""

    namespace: str
    pod: str
    name: str = ""
    uid: str = ""
    """Of the pod; empty: any."""


class Health(Struct, frozen=True):
    pass


class ListPods(Struct, frozen=True):
    pass


class Summary(Struct, frozen=True):
    pass


class ResourceMetrics(Struct, frozen=True):
    pass


class Logs(Struct, frozen=True, kw_only=True):
    container: Container
    follow: bool = False
    previous: bool = False
    tail: int | None = None
    """Lines; None: all."""
    since: int | None = None
    """Seconds before now."""
    since_time: datetime | None = None
    limit: int | None = None
    """Bytes."""
    timestamps: bool = False


class Exec(Struct, frozen=True, kw_only=True):
    container: Container
    command: tuple[str, ...]
    stdin: bool
    tty: bool


class Attach(Struct, frozen=True):
    container: Container


class Forward(Struct, frozen=True):
    container: Container
    ports: tuple[int, ...]
    """Empty with the tunnelling protocol, whose streams name theirs."""


Call = Health | ListPods | Summary | ResourceMetrics | Logs | Exec | Attach | Forward


class Permission(Struct, frozen=True):
    """``verb`` on any one of the ``subresources`` of the node."""

    verb: str
    subresources: tuple[str, ...]


def permission_for(method: str, path: str) -> Permission:
    first = _segments(path)[0]
    verb = "create" if first in _REACH_IN and method in _VERBS else _VERBS.get(method, "")
    finer = (_ALSO[first],) if first in _ALSO else ()
    return Permission(verb, (*finer, _OWN.get(first, "proxy")))


def parse_call(path: str, query: bytes) -> Call:
    """``path`` as it was sent. Raises NotFound, InvalidRequest, NotSupported."""
    first, *rest = _segments(path)
    asked = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    fixed: dict[tuple[str, ...], Call] = {
        ("healthz",): Health(),
        ("healthz", "ping"): Health(),
        ("pods",): ListPods(),
        ("runningpods",): ListPods(),
        ("stats", "summary"): Summary(),
        ("metrics", "resource"): ResourceMetrics(),
    }
    if (found := fixed.get((first, *rest))) is not None:
        return found
    if first == "containerLogs" and len(rest) == 3:
        return _logs(Container(*rest), asked)
    if first in ("exec", "attach") and len(rest) in (3, 4):
        container = Container(rest[0], rest[1], rest[-1], rest[2] if len(rest) == 4 else "")
        return _exec(container, asked) if first == "exec" else _attach(container, asked)
    if first == "portForward" and len(rest) in (2, 3):
        container = Container(rest[0], rest[1], uid=rest[2] if len(rest) == 3 else "")
        return Forward(container, _ports([*asked.get("port", ()), *asked.get("ports", ())]))
    raise NotFound(f"there is no {path} in this kubelet's API")


def _segments(path: str) -> list[str]:
    """Decoded; the permission and the call have to read a path in the same way."""
    return [unquote(part) for part in path.strip("/").split("/")]


def _logs(container: Container, asked: Mapping[str, Sequence[str]]) -> Logs:
    if _last(asked, "stream", "All") not in ("All", ""):
        raise NotSupported("stream: a VM has one log for both streams")
    tail = _last(asked, "tailLines", _last(asked, "tail", ""))
    since_time = _last(asked, "sinceTime", "")
    try:
        return Logs(
            container=container,
            follow=_flag(asked, "follow"),
            previous=_flag(asked, "previous"),
            tail=None if tail in ("", "all") else _count("tailLines", tail),
            since=min(_count("sinceSeconds", since), MAX_SECONDS)
            if (since := _last(asked, "sinceSeconds", ""))
            else None,
            since_time=_time(since_time) if since_time else None,
            limit=_count("limitBytes", limit) if (limit := _last(asked, "limitBytes", "")) else None,
            timestamps=_flag(asked, "timestamps"),
        )
    except ValueError:
        raise InvalidRequest(f"sinceTime: {since_time!r} is not a time") from None


def _time(text: str) -> datetime:
    """Raises ValueError, also without an offset from UTC."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("no offset")
    return found


def _exec(container: Container, asked: Mapping[str, Sequence[str]]) -> Exec:
    command = tuple(asked.get("command", ()))
    if not command:
        raise InvalidRequest("command: there is none")
    return Exec(container=container, command=command, stdin=_flag(asked, "input"), tty=_flag(asked, "tty"))


def _attach(container: Container, asked: Mapping[str, Sequence[str]]) -> Attach:
    if _flag(asked, "input"):
        raise NotSupported(
            "stdin: the program of a VM has no standard input; `kubectl exec -it` starts a shell next to it"
        )
    return Attach(container)


def _ports(texts: Sequence[str]) -> tuple[int, ...]:
    ports = tuple(_count("port", text) for each in texts for text in each.split(",") if text)
    if any(not 0 < port < 65536 for port in ports):
        raise InvalidRequest(f"port: {', '.join(map(str, ports))} is not between 1 and 65535")
    if len(ports) > MAX_PORTS:
        raise InvalidRequest(f"port: {len(ports)} are more than {MAX_PORTS}")
    return ports


def _flag(asked: Mapping[str, Sequence[str]], name: str) -> bool:
    return _last(asked, name, "") in _TRUE


def _last(asked: Mapping[str, Sequence[str]], name: str, default: str) -> str:
    values = asked.get(name)
    return values[-1] if values else default


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidRequest(f"{name}: {text!r} is not a number")
    return int(text)
