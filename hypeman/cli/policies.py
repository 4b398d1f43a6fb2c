"""Flags shared by several commands, and the parts of request bodies built from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from hypeman.cli.session import present

Decorator = Callable[[Any], Any]


def _all(*options: Decorator) -> Decorator:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def compression_options(prefix: str = "", *, delay: bool = True) -> Decorator:
    name = f"--{prefix}compression"
    options = [
        click.option(f"{name}-enabled/--no-{prefix}compression", "compression_enabled", default=None),
        click.option(f"{name}-algorithm", "compression_algorithm", type=click.Choice(["zstd", "lz4"])),
        click.option(f"{name}-level", "compression_level", type=click.IntRange(0, 19)),
    ]
    if delay:
        options.append(click.option(f"{name}-delay", "compression_delay", help="As in 10m."))
    return _all(*options)


def compression_body(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """None without any of the flags; naming an algorithm enables compression."""
    body = present(algorithm=flags["compression_algorithm"], level=flags["compression_level"])
    enabled = flags["compression_enabled"]
    if enabled is None and not body:
        return None
    return {"enabled": True if enabled is None else enabled, **body}


def health_options(prefix: str) -> Decorator:
    def option(name: str, **settings: Any) -> Decorator:
        return click.option(f"--{prefix}{name}", f"health_{name.replace('-', '_')}", **settings)

    return _all(
        option("type", type=click.Choice(["none", "http", "tcp", "exec"])),
        option("interval", help="As in 10s."),
        option("timeout", help="As in 2s."),
        option("start-period", help="As in 30s."),
        option("failure-threshold", type=click.IntRange(1)),
        option("success-threshold", type=click.IntRange(1)),
        option("http-port", type=click.IntRange(1, 65535)),
        option("http-path"),
        option("http-scheme", type=click.Choice(["http", "https"])),
        option("http-expected-status", type=click.IntRange(100, 599)),
        option("tcp-port", type=click.IntRange(1, 65535)),
        option("exec", multiple=True, help="One word each."),
        option("exec-working-dir"),
    )


def health_body(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    given = {name.removeprefix("health_"): value for name, value in flags.items() if name.startswith("health_")}
    body = present(
        type=given["type"],
        interval=given["interval"],
        timeout=given["timeout"],
        start_period=given["start_period"],
        failure_threshold=given["failure_threshold"],
        success_threshold=given["success_threshold"],
        http=present(
            port=given["http_port"],
            path=given["http_path"],
            scheme=given["http_scheme"],
            expected_status=given["http_expected_status"],
        ),
        tcp=present(port=given["tcp_port"]),
        exec=present(command=given["exec"], working_dir=given["exec_working_dir"]),
    )
    return body or None


def restart_options(prefix: str) -> Decorator:
    def option(name: str, **settings: Any) -> Decorator:
        return click.option(f"--{prefix}{name}", f"restart_{name.replace('-', '_')}", **settings)

    return _all(
        option("policy", type=click.Choice(["never", "always", "on_failure"])),
        option("backoff", help="As in 5s."),
        option("max-attempts", type=click.IntRange(0), help="0: no limit."),
        option("stable-after", help="As in 10m."),
    )


def docker_restart(text: str | None) -> dict[str, Any] | None:
    """Docker's restart policy as a RestartPolicy. Raises click.BadParameter. Pure."""
    if text is None:
        return None
    policy, colon, attempts = text.partition(":")
    names = {"no": "never", "always": "always", "unless-stopped": "always", "on-failure": "on_failure"}
    if policy not in names or (colon and (policy != "on-failure" or not attempts.isdigit())):
        raise click.BadParameter("must be no, always, unless-stopped or on-failure[:N]", param_hint="--restart")
    return {"policy": names[policy], **({"max_attempts": int(attempts)} if colon else {})}


def restart_body(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    body = present(
        policy=flags["restart_policy"],
        backoff=flags["restart_backoff"],
        max_attempts=flags["restart_max_attempts"],
        stable_after=flags["restart_stable_after"],
    )
    return body or None
