"""Logins at registries, kept where Docker, Podman and Skopeo keep theirs: ``config.json`` in ``~/.docker`` or in
``$DOCKER_CONFIG``, or a credential helper that it names.

A pull or push gets the login of its registry with the request; the server keeps it in memory, for that job alone.
Helpers: ``docker-credential-NAME get|store|erase``, the server's URL or JSON on standard input.
"""

from __future__ import annotations

import base64
import http.client
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import click
import msgspec

from hypeman.cli.session import Session, fail, reports, warn
from hypeman.errors import InvalidRequest
from hypeman.logins import DEFAULT_REGISTRY, Challenge, parse_challenges, registry_of_key
from hypeman.text import one_line

_HUB_KEY = "https://index.docker.io/v1/"
_HUB_API = "registry-1.docker.io"
_TOKEN_USER = "<token>"  # noqa: S105  # a name
"""What a helper gives as the user of an identity token, which requests cannot carry."""
_SECONDS = 30.0
_MAX_ANSWER = 1 << 20
_UNAUTHORIZED = 401


class LoginError(Exception):
    """The message is for the user."""


def registry_of(reference: str) -> str:
    """``host[:port]`` of an image's name; ``docker.io`` without one. Raises InvalidRequest. Pure."""
    from hypeman.images.reference import parse_reference

    return registry_of_key(parse_reference(reference).registry)


def login_for(reference: str) -> dict[str, str] | None:
    """``username`` and ``password`` for the registry of an image's name; None without a login. Raises LoginError,
    InvalidRequest."""
    registry = registry_of(reference)
    config = _read()
    if helper := _helper(config, registry):
        found = _ask(helper, "get", login_key(registry).encode())
        if found is None or found.get("Username") in (None, "", _TOKEN_USER):
            return None
        return {"username": str(found["Username"]), "password": str(found.get("Secret", ""))}
    entry = next((entry for key, entry in _entries(config) if registry_of_key(key) == registry), None)
    try:
        text = base64.b64decode((entry or {}).get("auth") or "", validate=True).decode()
    except (TypeError, ValueError):
        raise LoginError(f"{_path()}: the login of {registry} is not base64") from None
    username, colon, password = text.partition(":")
    return {"username": username, "password": password} if colon else None


def sent_login(reference: str) -> dict[str, str] | None:
    """What a request for an image carries: as ``login_for``, but with a warning in place of LoginError, since most
    images need no login. None for what is not the name of an image, which the server refuses."""
    try:
        return login_for(reference)
    except InvalidRequest:
        pass
    except LoginError as error:
        warn(f"without a login for {reference}: {error}")
    return None


@click.command()
@click.argument("registry", default=DEFAULT_REGISTRY)
@click.option("-u", "--username")
@click.option("-p", "--password", help="Visible to every user of this host; prefer --password-stdin.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@click.option("--insecure", is_flag=True, help="Plain HTTP.")
@click.option("--no-check", is_flag=True, help="Do not ask the registry, for one that only the server can reach.")
@reports
def login(
    session: Session,
    registry: str,
    username: str | None,
    password: str | None,
    password_stdin: bool,
    insecure: bool,
    no_check: bool,
) -> None:
    """Keep a login at a registry (default: Docker Hub) for pull, run, push and build, where Docker keeps its own."""
    if password_stdin and password:
        raise click.UsageError("give either --password or --password-stdin")
    if password_stdin and not username:
        raise click.UsageError("--password-stdin needs --username")
    registry = registry_of_key(registry)
    username = username or click.prompt("Username", err=True)
    if password_stdin:
        password = sys.stdin.read().rstrip("\r\n")
    password = password or click.prompt("Password", hide_input=True, err=True)
    try:
        if not no_check:
            _check(registry, username, password, insecure=insecure)
        where = _store(registry, username, password)
    except LoginError as error:
        fail(f"{registry}: {error}", "nothing was kept")
    click.echo(f"login succeeded; kept in {where}")


@click.command()
@click.argument("registry", default=DEFAULT_REGISTRY)
@reports
def logout(session: Session, registry: str) -> None:
    """Forget the login at a registry (default: Docker Hub)."""
    registry = registry_of_key(registry)
    try:
        known = _erase(registry)
    except LoginError as error:
        fail(f"{registry}: {error}")
    click.echo(f"the login at {registry} was removed" if known else f"there is no login at {registry}", err=not known)


# The file


def _path() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def _read() -> dict[str, Any]:
    try:
        found = msgspec.json.decode(_path().read_bytes() or b"{}")
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise LoginError(f"{_path()}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise LoginError(f"{_path()} is not a JSON object")
    return found


def _write(config: dict[str, Any]) -> None:
    """Replace the file, readable by its owner alone. A link to it stays one."""
    import tempfile

    path = _path().resolve()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".config.json-")
        try:
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(config), indent=4) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise LoginError(f"{path}: {error.strerror}") from None


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    auths = config.get("auths")
    for key, entry in auths.items() if isinstance(auths, dict) else ():
        if isinstance(entry, dict):
            yield key, entry


def login_key(registry: str) -> str:
    """Under which Docker keeps the login of a registry. Pure."""
    return _HUB_KEY if registry == DEFAULT_REGISTRY else registry


def _store(registry: str, username: str, password: str) -> str:
    """Keep a login; returns where."""
    config = _read()
    if helper := _helper(config, registry):
        login = {"ServerURL": login_key(registry), "Username": username, "Secret": password}
        _ask(helper, "store", msgspec.json.encode(login))
        return f"docker-credential-{helper}"
    kept = {key: entry for key, entry in _entries(config) if registry_of_key(key) != registry}
    kept[login_key(registry)] = {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}
    _write({**config, "auths": kept})
    return str(_path())


def _erase(registry: str) -> bool:
    """Forget a login; returns whether there was one."""
    config = _read()
    if helper := _helper(config, registry):
        return _ask(helper, "erase", login_key(registry).encode()) is not None
    entries = dict(_entries(config))
    kept = {key: entry for key, entry in entries.items() if registry_of_key(key) != registry}
    if len(kept) < len(entries):
        _write({**config, "auths": kept})
    return len(kept) < len(entries)


# Credential helpers


def _helper(config: dict[str, Any], registry: str) -> str:
    helpers = config.get("credHelpers")
    named = helpers.get(login_key(registry)) or helpers.get(registry) if isinstance(helpers, dict) else None
    name = named or config.get("credsStore") or ""
    if not isinstance(name, str) or "/" in name:
        raise LoginError(f"{_path()}: {name!r} is not the name of a credential helper")
    return name


def _ask(helper: str, verb: str, data: bytes) -> dict[str, Any] | None:
    """The helper's answer, {} for none; None if it has no such login."""
    import subprocess

    program = f"docker-credential-{helper}"
    try:
        result = subprocess.run([program, verb], input=data, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoginError(f"{program}: {getattr(error, 'strerror', None) or 'no answer'}") from None
    text = (result.stdout or result.stderr).decode(errors="replace").strip()
    if result.returncode:
        if "not found" in text:
            return None
        raise LoginError(f"{program} {verb}: {one_line(text) or f'exit code {result.returncode}'}")
    if verb != "get":
        return {}
    try:
        return msgspec.json.decode(result.stdout, type=dict[str, Any])
    except msgspec.DecodeError:
        raise LoginError(f"{program} {verb}: no JSON") from None


# The check


def _check(registry: str, username: str, password: str, *, insecure: bool) -> None:
    """Ask the registry whether it accepts the login: ``GET /v2/``, and its token service if it names one (the
    distribution specification, and Docker's token authentication). Raises LoginError."""
    host = _HUB_API if registry == DEFAULT_REGISTRY else registry
    url = f"{'http' if insecure else 'https'}://{host}/v2/"
    basic = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
    status, challenges = _get(url, "")
    if status == _UNAUTHORIZED:
        first = challenges[0] if challenges else Challenge("no", {})
        if realm := first.parameters.get("realm") if first.scheme == "bearer" else None:
            query = {"account": username, "service": first.parameters.get("service", "")}
            separator = "&" if "?" in realm else "?"
            url = f"{realm}{separator}{urlencode({key: text for key, text in query.items() if text})}"
            if urlsplit(url).scheme != "https" and not insecure:
                raise LoginError(f"its token service is not on HTTPS: {realm}")
        elif first.scheme != "basic":
            raise LoginError(f"it asks for {first.scheme} authentication, which is not supported")
        status, _ = _get(url, basic)
    if status == _UNAUTHORIZED:
        raise LoginError("it refuses this user name and password")
    if status != http.client.OK:
        raise LoginError(f"{url.partition('?')[0]} answers with status {status}")


def _get(url: str, authorization: str) -> tuple[int, list[Challenge]]:
    """Status and challenges. Redirects are not followed: the password is for this host."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(parts.netloc, timeout=_SECONDS)
        try:
            path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
            connection.request("GET", path, headers={"authorization": authorization} if authorization else {})
            answer = connection.getresponse()
            answer.read(_MAX_ANSWER)
            return answer.status, parse_challenges(answer.headers.get_all("www-authenticate", []))
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        hint = "; --insecure for one on plain HTTP, --no-check for one that only the server reaches"
        raise LoginError(f"no answer from {parts.scheme}://{parts.netloc}: {one_line(str(error))}{hint}") from None
