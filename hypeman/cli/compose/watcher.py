"""``compose watch``: looks for changed files here and carries out in the guests what ``watching`` says.

Directories are read twice a second: the same on Linux, macOS and Windows, and a network file system has no
notifications. A change is applied once two looks in a row found the same, so that a checkout or a build is one job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import sleep

import click

from hypeman.cli.client import ApiError, Unreachable
from hypeman.cli.compose.model import Service, Stack
from hypeman.cli.compose.watching import Job, Rule, Scan, changed, plan, scan
from hypeman.cli.context import ignore_text
from hypeman.cli.copy import CopyFailed, Sender
from hypeman.cli.execute import capture
from hypeman.cli.instances import restart_instance
from hypeman.cli.session import Session
from hypeman.text import one_line

_LOOK_SECONDS = 0.5
_RETRY_SECONDS = 5.0
_NAMED = 5
"""So many files of a job are named."""


class Watcher:
    """Of the services of a running stack. ``rebuild`` builds a service's image and replaces its instance."""

    def __init__(self, session: Session, stack: Stack, keys: Sequence[str], rebuild: Callable[[Service], None]) -> None:
        self._session = session
        self._rebuild = rebuild
        self._services = {service.key: service for service in stack.services if not keys or service.key in keys}
        self.rules = [rule for service in self._services.values() for rule in service.watch]
        self._applied = self._scan()
        self._last = self._applied
        self._complaints: dict[str, str] = {}

    def run(self) -> None:
        """Until it is interrupted."""
        while True:
            sleep(_LOOK_SECONDS if self.look() else _RETRY_SECONDS)

    def sync_at_first(self) -> None:
        """Copy what rules with ``initial_sync`` name."""
        pairs = zip(self.rules, self._applied, strict=True)
        whole = [(rule, *changed({}, found)) for rule, found in pairs if rule.initial_sync]
        for job in plan(whole):
            self._try(Job(job.service, written=job.written))

    def look(self) -> bool:
        """One look at all files; False if something could not be applied, and will be tried again."""
        now = self._scan()
        if now != self._last:
            self._last = now
            return True
        if now == self._applied:
            return True
        changes = [
            (rule, *changed(before, after)) for rule, before, after in zip(self.rules, self._applied, now, strict=True)
        ]
        failed = {job.service for job in plan(changes) if not self._try(job)}
        self._applied = [
            before if rule.service in failed else after
            for rule, before, after in zip(self.rules, self._applied, now, strict=True)
        ]
        return not failed

    def _scan(self) -> list[Scan]:
        return [scan(rule, self._ignored(rule)) for rule in self.rules]

    def _ignored(self, rule: Rule) -> str:
        """What the build's context leaves out is not watched either, if that is the rule's directory."""
        context = self._services[rule.service].build.get("context")
        return ignore_text(rule.path) if context and rule.path.is_dir() and str(rule.path) == str(context) else ""

    def _try(self, job: Job) -> bool:
        """Whether the job was done. A failure is shown once, however often it is tried again."""
        try:
            self._carry_out(job, self._services[job.service])
        except (ApiError, Unreachable, CopyFailed, OSError) as error:
            message = one_line(f"{job.service}: {error}")
            if self._complaints.get(job.service) != message:
                click.echo(message, err=True)
            self._complaints[job.service] = message
            return False
        self._complaints.pop(job.service, None)
        return True

    def _carry_out(self, job: Job, service: Service) -> None:
        if job.rebuild:
            self._rebuild(service)
            return
        if job.written or job.removed:
            names = [target for _, target in job.written] + list(job.removed)
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            click.echo(one_line(f"sync     {service.key}: {', '.join(names[:_NAMED])}{more}"), err=True)
        for path, target in job.written:
            sender = Sender(self._session.client, service.name, target, archive=False, follow_links=False)
            sender.send_file(str(path), target)
        if job.removed:
            self._run(service, ("rm", "-rf", "--", *job.removed))
        for command in job.commands:
            click.echo(one_line(f"exec     {service.key}: {' '.join(command)}"), err=True)
            self._run(service, command)
        if job.restart:
            click.echo(f"restart  {service.key}", err=True)
            restart_instance(self._session.client, service.name)

    def _run(self, service: Service, command: tuple[str, ...]) -> None:
        """A command that fails is shown, and not tried again: the files are there."""
        code, output = capture(self._session, service.name, command)
        if code != 0:
            click.echo(one_line(f"{service.key}: {command[0]} ended with {code}: {output.strip()[-500:]}"), err=True)
