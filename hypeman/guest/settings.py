"""What an image's labels and an instance's tags say about the guest. Pure.

    hypeman.pid1          true: the program is process 1; false: it is not; neither: if it is an init system
    hypeman.volumes       directories as an image's VOLUME, separated by spaces, as in "/var/lib/docker /srv"
    hypeman.shm-size      size of /dev/shm, as in 1GB
    hypeman.ulimit.NAME   soft:hard, or one number for both; -1 or unlimited; as in hypeman.ulimit.nofile=1024:65536
    hypeman.sysctl.NAME   a value, as in hypeman.sysctl.net.core.somaxconn=65535

A tag wins over a label of the same name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from hypeman.errors import InvalidRequest
from hypeman.guest.boot import MAX_SYSCTLS, UNLIMITED, Pid1, Ulimit
from hypeman.units import parse_size

_PID1 = "hypeman.pid1"
_SHM = "hypeman.shm-size"
_VOLUMES = "hypeman.volumes"
_ULIMIT = "hypeman.ulimit."
_SYSCTL = "hypeman.sysctl."
_SYSCTL_NAME = re.compile(r"[a-zA-Z0-9_-]+([./][a-zA-Z0-9_:-]+)+")
_LIMITS: dict[str, int] = {
    "core": 4,
    "cpu": 0,
    "data": 2,
    "fsize": 1,
    "locks": 10,
    "memlock": 8,
    "msgqueue": 12,
    "nice": 13,
    "nofile": 7,
    "nproc": 6,
    "rss": 5,
    "rtprio": 14,
    "rttime": 15,
    "sigpending": 11,
    "stack": 3,
}
"""Names as Docker's ``--ulimit`` has them; Linux's numbers, the same on x86 and ARM."""
MIN_SHM = 1 << 20


class GuestSettings(msgspec.Struct, frozen=True):
    pid1: Pid1 = Pid1.DETECT
    shm_bytes: int = 0
    """0: the agent's choice."""
    volume_dirs: tuple[str, ...] = ()
    """Beside those that the image declares."""
    sysctls: tuple[str, ...] = ()
    """"name=value" each."""
    ulimits: tuple[Ulimit, ...] = ()


class _Wrong(Exception):
    """A word with this key says nothing that can be done."""

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        self.problem = problem


def parse_settings(tags: Mapping[str, str], labels: Mapping[str, str] | None = None) -> GuestSettings:
    """The settings in an instance's ``tags`` and its image's ``labels``. Raises InvalidRequest, naming the culprit."""
    try:
        return _parse({**(labels or {}), **tags})
    except _Wrong as error:
        kind = "tag" if error.key in tags else "the image's label"
        raise InvalidRequest(f"{kind} {error.key}: {error.problem}") from None


def _parse(words: Mapping[str, str]) -> GuestSettings:
    sysctls = tuple(_sysctl(key, value) for key, value in sorted(words.items()) if key.startswith(_SYSCTL))
    if len(sysctls) > MAX_SYSCTLS:
        raise InvalidRequest(f"{len(sysctls)} settings {_SYSCTL}…: at most {MAX_SYSCTLS} are possible")
    return GuestSettings(
        pid1=_pid1(words[_PID1]) if _PID1 in words else Pid1.DETECT,
        shm_bytes=_shm(words[_SHM]) if _SHM in words else 0,
        volume_dirs=tuple(_directory(path) for path in words.get(_VOLUMES, "").split()),
        sysctls=sysctls,
        ulimits=tuple(_ulimit(key, value) for key, value in sorted(words.items()) if key.startswith(_ULIMIT)),
    )


def _pid1(value: str) -> Pid1:
    match value.lower():
        case "true" | "1" | "yes":
            return Pid1.WORKLOAD
        case "false" | "0" | "no":
            return Pid1.AGENT
        case _:
            raise _Wrong(_PID1, f"{value!r} is neither true nor false")


def _shm(value: str) -> int:
    try:
        size = parse_size(value)
    except InvalidRequest as error:
        raise _Wrong(_SHM, error.message) from None
    if size < MIN_SHM:
        raise _Wrong(_SHM, f"{value} is less than 1MB")
    return size


def _directory(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/") or path.split("/")[1] in ("", "dev", "proc", "sys"):
        raise _Wrong(_VOLUMES, f"{path!r} is not an absolute path of a directory that can be a volume")
    return path


def _sysctl(key: str, value: str) -> str:
    name = key.removeprefix(_SYSCTL)
    if not _SYSCTL_NAME.fullmatch(name):
        raise _Wrong(key, f"{name!r} is not the name of a sysctl, as in net.core.somaxconn")
    return f"{name}={value}"


def _ulimit(key: str, value: str) -> Ulimit:
    name = key.removeprefix(_ULIMIT)
    if name not in _LIMITS:
        raise _Wrong(key, f"{name!r} is not one of {', '.join(_LIMITS)}")
    soft, colon, hard = value.partition(":")
    limits = [_limit(key, text) for text in ((soft, hard) if colon else (soft, soft))]
    if limits[0] > limits[1]:
        raise _Wrong(key, f"the soft limit {soft} is above the hard limit {hard}")
    return Ulimit(_LIMITS[name], *limits)


def _limit(key: str, text: str) -> int:
    if text in ("-1", "unlimited"):
        return UNLIMITED
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise _Wrong(key, f"{text!r} is neither a number nor unlimited; write soft:hard")
    return int(text)
