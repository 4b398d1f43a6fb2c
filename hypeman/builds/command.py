"""What is run in the VM of a build: BuildKit's configuration and arguments. Pure.

/var/lib/buildkit            BuildKit's state: the builder's cache, a volume
/hypeman/context             the context, unpacked
/hypeman/dockerfile          a Dockerfile that was sent beside it
/hypeman/out                 the result: an OCI layout
/run/hypeman-build           a tmpfs: socket, configuration, secrets, logins
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from msgspec import Struct

from hypeman.builds.request import BuildSpec

STATE = "/var/lib/buildkit"
WORK = "/hypeman"
CONTEXT = f"{WORK}/context"
DOCKERFILE = f"{WORK}/dockerfile"
OUT = f"{WORK}/out"
IMAGES = f"{WORK}/images"
CACHE_IN = f"{WORK}/cache-in"
CACHE_OUT = f"{WORK}/cache-out"
PRIVATE = "/run/hypeman-build"
SECRETS = f"{PRIVATE}/secrets"
SSH = f"{PRIVATE}/ssh"
DOCKER = f"{PRIVATE}/docker"
CONFIG = f"{PRIVATE}/buildkitd.toml"
CA_FILE = f"{PRIVATE}/ca.pem"
SOCKET = f"unix://{PRIVATE}/buildkitd.sock"
_CONNECT_SECONDS = 120

PREPARE = (
    f"set -e; mkdir -p {CONTEXT} {DOCKERFILE} {PRIVATE}; "
    f"mount -t tmpfs -o size=64m,mode=0700 hypeman-build {PRIVATE}; mkdir -m 0700 {SECRETS} {SSH} {DOCKER}"
)
"""A shell script."""
UNPACK = ("tar", "-xzf", "-", "-C", CONTEXT)
LOCKFILES = ("package-lock.json", "yarn.lock", "pnpm-lock.yaml", "bun.lock", "go.sum", "Cargo.lock", "poetry.lock",
             "uv.lock", "Pipfile.lock", "requirements.txt", "Gemfile.lock", "composer.lock")  # fmt: skip
HASH_LOCKFILES = f"cd {CONTEXT} && for f in {' '.join(LOCKFILES)}; do [ -f $f ] && sha256sum $f; done; true"
"""A shell script."""


class LocalImage(Struct, frozen=True):
    """An image of this host, as an OCI layout in the VM."""

    name: str
    """As BuildKit looks for it."""
    directory: str
    digest: str


def render_config(insecure: Iterable[str], mirrors: Mapping[str, Iterable[str]], keep_bytes: int) -> str:
    """``buildkitd.toml``: the registries as this server knows them, and how much cache is kept."""
    lines = [
        "[worker.oci]",
        "  gc = true",
        f"  maxUsedSpace = {keep_bytes}",
        "[worker.containerd]",
        "  enabled = false",
        "[history]",  # would keep the output of steps in the cache, and with it what they print of secrets
        "  maxEntries = 0",
    ]
    insecure = set(insecure)
    for registry in sorted(insecure | set(mirrors)):
        lines.append(f"[registry.{_quoted(registry)}]")
        if registry in insecure:
            lines.append("  http = true")
        if mirrors.get(registry):
            lines.append(f"  mirrors = [{', '.join(_quoted(mirror) for mirror in mirrors[registry])}]")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def daemon_command() -> tuple[str, ...]:
    """BuildKit's daemon. Its containers share the VM's network: the VM is what separates them from others."""
    return ("buildkitd", "--config", CONFIG, "--root", STATE, "--addr", SOCKET, "--oci-worker-net", "host")


def build_command(
    spec: BuildSpec,
    *,
    cache_in: Sequence[str] = (),
    cache_out: Sequence[str] = (),
    images: Sequence[LocalImage] = (),
) -> tuple[str, ...]:
    """``buildctl build`` for ``spec``; its progress is on standard error. ``cache_in``, ``cache_out``: directories of
    OCI layouts to read caches from, and to write the cache to. ``images``: what is taken from them instead of from
    registries."""
    argv = ["buildctl", "--timeout", str(_CONNECT_SECONDS), "--addr", SOCKET, "--wait", "build"]
    path = PurePosixPath("Dockerfile" if spec.dockerfile else spec.dockerfile_path)
    directory = DOCKERFILE if spec.dockerfile else str(PurePosixPath(CONTEXT) / path.parent)
    argv += ["--progress", "rawjson", "--frontend", "dockerfile.v0"]
    argv += ["--local", f"context={CONTEXT}", "--local", f"dockerfile={directory}"]
    argv += _opt("filename", path.name)
    if spec.target:
        argv += _opt("target", spec.target)
    if spec.platform:
        argv += _opt("platform", spec.platform)
    for key, value in spec.build_args.items():
        argv += _opt(f"build-arg:{key}", value)
    for key, value in spec.labels.items():
        argv += _opt(f"label:{key}", value)
    if spec.no_cache:
        argv.append("--no-cache")
    if spec.pull:
        argv += _opt("image-resolve-mode", "pull")
    if spec.provenance:
        argv += _opt("attest:provenance", "" if spec.provenance == "true" else spec.provenance)
    if spec.sbom:
        argv += _opt("attest:sbom", "" if spec.sbom == "true" else spec.sbom)
    known = {name for name, _ in spec.secrets}
    for name, variable in spec.secrets:
        argv += ["--secret", f"id={name},src={SECRETS}/{name}"]
        if variable and variable not in known:
            argv += ["--secret", f"id={variable},src={SECRETS}/{name}"]
    for name in spec.ssh:
        argv += ["--ssh", f"{name}={SSH}/{name}"]
    for cache in spec.cache_from:
        argv += ["--import-cache", cache]
    for cache in spec.cache_to:
        argv += ["--export-cache", cache]
    for place, image in enumerate(images):
        argv += ["--oci-layout", f"image{place}={image.directory}"]
        argv += _opt(f"context:{image.name}", f"oci-layout://image{place}@{image.digest}")
    for directory in cache_in:
        argv += ["--import-cache", f"type=local,src={directory}"]
    for directory in cache_out:
        argv += ["--export-cache", f"type=local,dest={directory},mode=max,oci-mediatypes=true,image-manifest=true"]
    return (*argv, "--output", f"type=oci,tar=false,dest={OUT}")


def _opt(key: str, value: str) -> list[str]:
    return ["--opt", f"{key}={value}"]
