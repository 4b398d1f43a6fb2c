"""The policies of an instance, decoded: durations as seconds, defaults filled in. Pure.

A request's policy is decoded once to check it, and again by the code that follows it; what is stored and echoed
is what the client sent. Each refusal has the code of its policy (§2.3).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import msgspec

from hypeman.errors import InvalidRequest
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    HealthCheck,
    HealthCheckType,
    RestartMode,
    RestartPolicy,
    WakeOn,
)
from hypeman.units import parse_duration

MIN_INTERVAL = 0.1
"""Shortest interval of a health check, in seconds; it bounds the cost of one instance."""
MAX_THRESHOLD = 1000
"""Of checks in a row. Checked in requests only: what is stored stays as it is."""
MAX_ATTEMPTS = 1_000_000
MAX_TIMEOUT = 300.0
"""Longest timeout of a health check, in seconds."""
DEFAULT_IDLE = 300.0
"""Seconds without activity before standby, if an enabled policy does not say."""
MAX_IGNORED = 64
"""Most ports, and most networks, that a policy may ignore."""
MAX_WORDS = 64
"""Most words of a health check's command."""


class RestartRules(msgspec.Struct, frozen=True):
    mode: RestartMode = RestartMode.NEVER
    backoff: float = 5.0
    """Seconds before the first restart; each further one waits twice as long."""
    max_attempts: int = 0
    """0: unlimited."""
    stable_after: float = 600.0
    """Seconds of running after which earlier attempts no longer count."""

    @property
    def active(self) -> bool:
        return self.mode is not RestartMode.NEVER


class HealthRules(msgspec.Struct, frozen=True):
    type: HealthCheckType = HealthCheckType.NONE
    interval: float = 10.0
    timeout: float = 2.0
    start_period: float = 30.0
    failure_threshold: int = 3
    success_threshold: int = 1
    port: int = 0
    path: str = "/"
    tls: bool = False
    expected_status: int = 200
    expected_status_max: int = 0
    """The end of a range from ``expected_status`` on; 0: that alone."""
    command: tuple[str, ...] = ()
    working_dir: str = ""

    @property
    def active(self) -> bool:
        return self.type is not HealthCheckType.NONE


class StandbyRules(msgspec.Struct, frozen=True):
    enabled: bool = False
    idle_timeout: float = DEFAULT_IDLE
    """Seconds."""
    ignored_sources: tuple[ipaddress.IPv4Network, ...] = ()
    ignored_ports: frozenset[int] = frozenset()
    wake: WakeOn = WakeOn.NONE
    count_udp: bool = False

    def ignores(self, source: ipaddress.IPv4Address, port: int) -> bool:
        """Whether a packet or connection from ``source`` to ``port`` (0: no port) neither counts nor wakes."""
        return port in self.ignored_ports or any(source in network for network in self.ignored_sources)


def restart_rules(policy: RestartPolicy | None) -> RestartRules:
    """Raises InvalidRequest ``invalid_restart_policy``."""
    if policy is None:
        return RestartRules()
    code = "invalid_restart_policy"
    default = RestartRules()
    backoff = parse_duration(policy.backoff, code=code) if policy.backoff is not None else default.backoff
    if backoff <= 0:
        raise InvalidRequest("restart_policy.backoff must be greater than 0", code=code)
    return RestartRules(
        mode=policy.policy or default.mode,
        backoff=backoff,
        max_attempts=policy.max_attempts or 0,
        stable_after=(
            parse_duration(policy.stable_after, code=code) if policy.stable_after is not None else default.stable_after
        ),
    )


def health_rules(check: HealthCheck | None) -> HealthRules:
    """Raises InvalidRequest ``invalid_health_check``."""
    if check is None:
        return HealthRules()
    default = HealthRules()
    kind = check.type or HealthCheckType.NONE
    rules = HealthRules(
        type=kind,
        interval=_seconds(check.interval, "interval", default.interval),
        timeout=_seconds(check.timeout, "timeout", default.timeout),
        start_period=_seconds(check.start_period, "start_period", default.start_period),
        failure_threshold=check.failure_threshold or default.failure_threshold,
        success_threshold=check.success_threshold or default.success_threshold,
    )
    if rules.interval < MIN_INTERVAL:
        raise _bad_check(f"interval must be at least {MIN_INTERVAL:g}s")
    if not 0 < rules.timeout <= MAX_TIMEOUT:
        raise _bad_check(f"timeout must be greater than 0 and at most {MAX_TIMEOUT:g}s")
    match kind:
        case HealthCheckType.HTTP:
            if check.http is None:
                raise _bad_check("type http requires http.port")
            path = check.http.path or "/"
            if not path.startswith("/") or any(ord(letter) <= 32 or ord(letter) > 126 for letter in path):
                raise _bad_check("http.path must begin with / and consist of printable ASCII without spaces")
            first = check.http.expected_status or default.expected_status
            last = check.http.expected_status_max or 0
            if last and last < first:
                raise _bad_check("http.expected_status_max must not be less than http.expected_status")
            return msgspec.structs.replace(
                rules,
                port=check.http.port,
                path=path,
                tls=check.http.scheme == "https",
                expected_status=first,
                expected_status_max=last,
            )
        case HealthCheckType.TCP:
            if check.tcp is None:
                raise _bad_check("type tcp requires tcp.port")
            return msgspec.structs.replace(rules, port=check.tcp.port)
        case HealthCheckType.EXEC:
            if check.exec is None or not check.exec.command[0]:
                raise _bad_check("type exec requires exec.command")
            if len(check.exec.command) > MAX_WORDS or any("\0" in word for word in check.exec.command):
                raise _bad_check(f"exec.command can have at most {MAX_WORDS} words, without NUL bytes")
            return msgspec.structs.replace(
                rules, command=check.exec.command, working_dir=check.exec.working_dir or default.working_dir
            )
        case HealthCheckType.NONE:
            return rules


def standby_rules(policy: AutoStandbyPolicy | None) -> StandbyRules:
    """Raises InvalidRequest ``invalid_auto_standby``."""
    if policy is None:
        return StandbyRules()
    code = "invalid_auto_standby"
    enabled = bool(policy.enabled)
    idle = parse_duration(policy.idle_timeout, code=code) if policy.idle_timeout is not None else DEFAULT_IDLE
    if idle <= 0:
        raise InvalidRequest("auto_standby.idle_timeout must be greater than 0", code=code)
    ports, sources = policy.ignore_destination_ports or (), policy.ignore_source_cidrs or ()
    if len(ports) > MAX_IGNORED or len(sources) > MAX_IGNORED:
        raise InvalidRequest(f"auto_standby can ignore at most {MAX_IGNORED} ports and networks", code=code)
    return StandbyRules(
        enabled=enabled,
        idle_timeout=idle,
        ignored_sources=_networks(sources, code),
        ignored_ports=frozenset(ports),
        wake=policy.wake or (WakeOn.TRAFFIC if enabled else WakeOn.NONE),
        count_udp=bool(policy.count_udp),
    )


def check_policies(
    auto_standby: AutoStandbyPolicy | None,
    health_check: HealthCheck | None,
    restart_policy: RestartPolicy | None,
    *,
    network: bool,
    agent: bool,
) -> None:
    """Raise InvalidRequest with the code of the policy that an instance with or without network and guest agent
    cannot have."""
    standby_rules(auto_standby)
    restart = restart_rules(restart_policy)
    health = health_rules(health_check)
    if restart.max_attempts > MAX_ATTEMPTS:
        raise InvalidRequest(
            f"restart_policy.max_attempts can be at most {MAX_ATTEMPTS}; 0 is without limit",
            code="invalid_restart_policy",
        )
    for name in ("failure_threshold", "success_threshold"):
        if getattr(health, name) > MAX_THRESHOLD:
            raise _bad_check(f"{name} can be at most {MAX_THRESHOLD}")
    if health.type in (HealthCheckType.HTTP, HealthCheckType.TCP) and not network:
        raise _bad_check(f"type {health.type.value} requires the instance to have a network")
    if health.type is HealthCheckType.EXEC and not agent:
        raise _bad_check("type exec requires the guest agent (skip_guest_agent is set)")


def _networks(texts: Sequence[str], code: str) -> tuple[ipaddress.IPv4Network, ...]:
    return tuple(_network(text, code) for text in texts)


def _network(text: str, code: str) -> ipaddress.IPv4Network:
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        problem = "is not an IPv4 network; write an address and a prefix length, as in 192.0.2.0/24"
    else:
        if isinstance(found, ipaddress.IPv4Network):
            return found
        problem = "is IPv6, which guests do not have: no connection comes from there"
    raise InvalidRequest(f"auto_standby.ignore_source_cidrs: {text[:80]!r} {problem}", code=code)


def _seconds(text: str | None, field: str, default: float) -> float:
    if text is None:
        return default
    try:
        return parse_duration(text)
    except InvalidRequest as error:
        raise _bad_check(f"{field}: {error.message}") from None


def _bad_check(message: str) -> InvalidRequest:
    return InvalidRequest(f"health_check: {message}", code="invalid_health_check")
