"""Values that the operator supplies on this host: files, systemd credentials, the output of programs.

Only the server's configuration says which there are and for which hosts; a client of the API names one and can neither
read it nor send it elsewhere.

    file, systemd   read at once and again when it has changed; a newline at its end does not count
    exec            run when the value is needed; its output is kept for its lifetime

A program writes a JSON object: ``value``, or what the AWS CLI calls ``credential_process`` output; ``expires_at`` or
``Expiration`` (RFC 3339), or ``expires_in`` (seconds). It gets no environment but PATH and a locale, no input, and is
killed with its process group at its time limit. What it writes to standard error is not logged: it may hold secrets.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import trio

from hypeman.config import CredentialSourceConfig
from hypeman.egress.oauth2 import token_url
from hypeman.egress.policy import HostPattern, parse_host, parse_hosts
from hypeman.egress.transforms import Unavailable, Value, valid_until
from hypeman.egress.types import CredentialPolicy
from hypeman.errors import InvalidRequest
from hypeman.host.processes import Processes, ToolFailed

MAX_SIZE = 64 << 10
"""Bytes of a file or of a program's output."""
_LOOK_AGAIN = 2.0
"""Seconds between looks at whether a file has changed."""
_CREDENTIALS_DIRECTORY = "CREDENTIALS_DIRECTORY"


class Source:
    """One configured source."""

    def __init__(self, name: str, config: CredentialSourceConfig, processes: Processes) -> None:
        """Raises InvalidRequest if one of its hosts is not a host."""
        self.name = name
        self.hosts = tuple(parse_host(host) for host in config.hosts)
        self._config = config
        self._processes = processes
        self._seen: tuple[int, ...] = ()
        """Identity of the file as it was read."""

    def covers(self, host: HostPattern) -> bool:
        """Whether all names that ``host`` matches are among the source's."""
        return any(host == mine or (not host.wildcard and mine.covers(host)) for mine in self.hosts)

    async def obtain(self) -> Value:
        """The value now. Raises Unavailable."""
        if self._config.exec:
            return await self._run()
        return Value(await trio.to_thread.run_sync(self._read))

    async def wait_changed(self, value: Value) -> None:
        """Until ``value`` should be obtained again."""
        if not self._config.exec:
            # other programs write the file
            while await trio.to_thread.run_sync(self._identity) == self._seen:  # noqa: ASYNC110
                await trio.sleep(_LOOK_AGAIN)
        else:
            await sleep_until_renewal(value, self._config.lifetime)

    @property
    def _path(self) -> Path:
        if self._config.file:
            return Path(self._config.file)
        directory = os.environ.get(_CREDENTIALS_DIRECTORY)
        if not directory:
            raise Unavailable(f"source {self.name}: the server has no systemd credentials")
        return Path(directory) / self._config.systemd

    def _identity(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> str:
        path = self._path
        self._seen = self._identity()
        try:
            # O_NONBLOCK: a FIFO would block the thread until it has a writer
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise Unavailable(f"source {self.name}: {path} is not a file")
                data = file.read(MAX_SIZE + 1)
            text = data.decode()
        except OSError as error:
            raise Unavailable(f"source {self.name}: {path} cannot be read: {error.strerror}") from None
        except UnicodeError:
            raise Unavailable(f"source {self.name}: {path} is not text") from None
        if len(data) > MAX_SIZE:
            raise Unavailable(f"source {self.name}: {path} has more than {MAX_SIZE} bytes")
        return text.rstrip("\r\n")

    async def _run(self) -> Value:
        argv = self._config.exec
        try:
            output = await self._processes.run(argv, timeout=self._config.timeout, max_output=MAX_SIZE)
        except ToolFailed as error:
            how = (
                f"ended with {error.returncode}" if error.returncode is not None else "failed or did not finish in time"
            )
            raise Unavailable(f"source {self.name}: {argv[0]} {how}") from None
        try:
            return read_output(output)
        except ValueError as error:
            raise Unavailable(f"source {self.name}: the output of {argv[0]} cannot be used: {error}") from None


def read_output(output: bytes) -> Value:
    """The value that a program wrote. Raises ValueError, never containing it."""
    try:
        found = msgspec.json.decode(output, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise ValueError("it is not a JSON object") from None
    text = found.get("value")
    if text is None and "AccessKeyId" in found and "SecretAccessKey" in found:
        text = output.decode()
    if not isinstance(text, str) or not text:
        raise ValueError("it has no value")
    until = found.get("expires_at", found.get("Expiration"))
    after = found.get("expires_in")
    if isinstance(until, str):
        try:
            moment = datetime.fromisoformat(until)
        except ValueError:
            raise ValueError("the time at which it expires is not RFC 3339") from None
        if moment.tzinfo is None:
            raise ValueError("the time at which it expires has no time zone")
        return Value(text, valid_until(moment.timestamp()))
    if isinstance(after, int | float) and not isinstance(after, bool) and after > 0:
        try:
            return Value(text, valid_until(time.time() + after))
        except OverflowError:
            raise ValueError("the time at which it expires is too far away") from None
    if until is not None or after is not None:
        raise ValueError("the time at which it expires is neither text nor a number of seconds")
    return Value(text)


async def sleep_until_renewal(value: Value, lifetime: float) -> None:
    """Until ``value`` is to be replaced: well before it expires, or after ``lifetime`` seconds if it does not."""
    if not value.expires_at:
        await trio.sleep(lifetime)
        return
    left = value.expires_at - time.time()
    await trio.sleep(max(1.0, left - min(300.0, left / 5)))


def _host_of(url: str) -> HostPattern:
    return parse_host(urlsplit(url).hostname or "")


class Sources:
    """All that are configured."""

    def __init__(self, configured: Mapping[str, CredentialSourceConfig], processes: Processes) -> None:
        self._all = {name: Source(name, config, processes) for name, config in configured.items()}

    def find(self, name: str) -> Source:
        """Raises InvalidRequest."""
        source = self._all.get(name)
        if source is None:
            raise InvalidRequest(f"the server's configuration has no credential source {name!r}")
        return source

    def check(self, credentials: Mapping[str, CredentialPolicy]) -> None:
        """Raise InvalidRequest if a source is not configured, or not for the hosts that are to get its value."""
        for key, policy in credentials.items():
            if policy.source.named is None:
                continue
            source = self.find(policy.source.named)
            for rule in policy.inject:
                hosts: tuple[HostPattern | None, ...] = parse_hosts(rule) or (None,)
                if rule.as_.oauth2 is not None:
                    hosts = (*hosts, _host_of(token_url(rule.as_.oauth2)))
                for host in hosts:
                    if host is None or not source.covers(host):
                        shown = "every host" if host is None else host
                        raise InvalidRequest(
                            f"credential {key!r}: source {source.name!r} is not allowed for {shown}, only for "
                            f"{', '.join(source.hosts)}"
                        )
