"""``hypeman bundle``: make, check and install one signed file for hosts without a network. Runs on the host itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from hypeman.cli.session import Session, fail

_KEYS = Path("/etc/hypeman/bundle-keys")
_APPLIANCE = re.compile(r"hypeman-(?P<version>.+)-linux-(?P<architecture>[a-z0-9]+)\.tar\.gz")

File = click.Path(exists=True, dir_okay=False, path_type=Path)
_keys = click.option(
    "--key",
    "keys",
    multiple=True,
    type=File,
    help=f"Public key to trust (minisign's format), repeatable; default: all of {_KEYS}/*.pub.",
)


@click.group("bundle")
def bundle() -> None:
    """One signed file that installs a host without a network: appliance, VMM, images, settings, instances."""


@bundle.command("keygen")
@click.argument("name", type=click.Path(path_type=Path))
def make_key(name: Path) -> None:
    """Create a signing key: NAME.key (secret, without a password) and NAME.pub. minisign can use both."""
    from hypeman.bundle.minisign import new_key

    key = new_key()
    try:
        for path, mode, text in ((f"{name}.key", 0o600, key.render()), (f"{name}.pub", 0o644, key.public.render())):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    click.echo(f"key {key.public}: {name}.key, {name}.pub")


@bundle.command("create")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--name", required=True, help="Name of the bundle, and of the stack of its instances.")
@click.option("--appliance", required=True, type=File, help="hypeman-VERSION-linux-ARCH.tar.gz of a release.")
@click.option("--secret-key", required=True, type=File, help="From `hypeman bundle keygen` or `minisign -G -W`.")
@click.option("--vmm", "vmms", multiple=True, type=File, help="Static program: cloud-hypervisor, firecracker, jailer.")
@click.option(
    "--package", "packages", multiple=True, type=File, help="Debian package that the host needs, such as QEMU's."
)
@click.option(
    "--image", "images", multiple=True, metavar="NAME=ARCHIVE", help="Image from an OCI or Docker archive (a tar)."
)
@click.option("--settings", "configs", multiple=True, type=File, help="Drop-in for the configuration (YAML).")
@click.option("--compose", type=File, help="Instances to create, as for `hypeman compose up`.")
@click.pass_obj
def create_bundle(
    session: Session,
    file: Path,
    name: str,
    appliance: Path,
    secret_key: Path,
    vmms: tuple[Path, ...],
    packages: tuple[Path, ...],
    images: tuple[str, ...],
    configs: tuple[Path, ...],
    compose: Path | None,
) -> None:
    """Write a new signed bundle FILE.

    The guest kernel is part of the appliance. Settings are checked before they are packed.
    """
    match = _APPLIANCE.fullmatch(appliance.name)
    if match is None:
        fail(f"{appliance.name} must be named hypeman-VERSION-linux-ARCH.tar.gz")
    named = [image.partition("=") for image in images]
    if wrong := [image for image, equals, archive in named if not equals or not Path(archive).is_file()]:
        fail(f"--image {wrong[0]} must be NAME=ARCHIVE, with an archive that exists")

    def act() -> Any:
        import tempfile

        import msgspec

        from hypeman.bundle.format import Kind, Manifest, describe, write
        from hypeman.bundle.minisign import parse_secret_key
        from hypeman.config import load_config

        for config in configs:
            load_config(config, {})
        sources = [(appliance, Kind.APPLIANCE, "", "")]
        sources += [(path, Kind.VMM, "", "") for path in vmms]
        sources += [(path, Kind.PACKAGE, "", "") for path in packages]
        sources += [(path, Kind.CONFIG, f"{n:03}.yaml", "") for n, path in enumerate(configs)]
        sources += [(Path(archive), Kind.IMAGE, f"{n:03}.tar", image) for n, (image, _, archive) in enumerate(named)]
        sources += [(compose, Kind.COMPOSE, "compose.yaml", "")] if compose else []
        described = [describe(path, kind, as_name, reference=image) for path, kind, as_name, image in sources]
        manifest = msgspec.convert(
            {
                "format": 1, **match.groupdict(), "name": name, "created_at": datetime.now(UTC),
                "files": msgspec.to_builtins(described),
            },
            Manifest,
        )  # fmt: skip
        key = parse_secret_key(secret_key.read_bytes())
        with tempfile.NamedTemporaryFile(dir=file.absolute().parent, prefix=f".{file.name}.") as half:
            write(half, manifest, [path for path, *_ in sources], key)  # type: ignore[arg-type]
            half.flush()
            os.fsync(half.fileno())
            os.link(half.name, file)  # never replaces another file
        file.chmod(0o644)
        return manifest, key.public

    manifest, public = _run(act)
    click.echo(
        f"{file}: {manifest.name} {manifest.version} {manifest.architecture}, {len(manifest.files)} files, key {public}"
    )


@bundle.command("verify")
@click.argument("file", type=File)
@_keys
@click.pass_obj
def verify_bundle(session: Session, file: Path, keys: tuple[Path, ...]) -> None:
    """Check the signature and every byte of FILE, and list what is in it. Writes nothing."""

    def act() -> Any:
        import msgspec

        from hypeman.bundle.format import check_file

        verified = check_file(file, _trusted(keys))
        return msgspec.to_builtins(verified.manifest) | {"digest": verified.digest, "key": str(verified.key)}

    found = _run(act)
    lines = [f"{found['name']} {found['version']} {found['architecture']}, signed with key {found['key']}"]
    lines += [f"  {file['name']} {file['size']} {file.get('reference', '')}".rstrip() for file in found["files"]]
    session.show(found, lambda: "\n".join(lines))


@bundle.command("install")
@click.argument("file", type=File)
@_keys
def install_bundle(file: Path, keys: tuple[Path, ...]) -> None:
    """Install or upgrade this host from FILE, as root, without a network.

    If the new server does not come up, the version before is put back, with its settings and records.
    """

    def act() -> Any:
        from hypeman.bundle.install import Site, Systemd

        return Site(Systemd()).install(file, _trusted(keys), lambda line: click.echo(line))

    manifest = _run(act).manifest
    click.echo(f"installed: {manifest.name}, hypeman {manifest.version}")


@bundle.command("rollback")
@click.option("--if-unfinished", is_flag=True, help="Only if an installation was interrupted.")
def roll_back(if_unfinished: bool) -> None:
    """Return to the version before the last `hypeman bundle install`: programs, settings and records."""

    def act() -> Any:
        from hypeman.bundle.install import Site, Systemd

        return Site(Systemd()).roll_back(only_unfinished=if_unfinished)

    journal = _run(act)
    click.echo(f"rolled back from hypeman {journal.version}" if journal else "there is nothing to roll back")


@bundle.command("status")
@click.pass_obj
def show_status(session: Session) -> None:
    """Show what the last installation from a bundle did."""

    def act() -> Any:
        import msgspec

        from hypeman.bundle.install import Site, Systemd

        return msgspec.to_builtins(Site(Systemd()).journal())

    found = _run(act)
    if found is None:
        fail("no bundle was installed on this host")
    reason = f": {found['reason']}" if found["reason"] else ""
    session.show(found, lambda: f"{found['phase']}: {found['name']}, hypeman {found['version']}, {found['at']}{reason}")


def _trusted(keys: tuple[Path, ...]) -> Any:
    from hypeman.bundle.minisign import parse_public_key
    from hypeman.errors import InvalidRequest

    found = []
    for path in keys or sorted(_KEYS.glob("*.pub")):
        try:
            found.append(parse_public_key(path.read_bytes()))
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error.message}") from None
    if not found:
        raise InvalidRequest(f"no trusted key: give --key FILE, or put one into {_KEYS}")
    return found


def _run(action: Callable[[], Any]) -> Any:
    """What ``action`` returns; ends the command with its error."""
    import msgspec

    from hypeman.errors import HypemanError

    try:
        return action()
    except HypemanError as error:
        fail(error.message)
    except msgspec.ValidationError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or error.filename2 or ''}: {error.strerror}".removeprefix(": "))
