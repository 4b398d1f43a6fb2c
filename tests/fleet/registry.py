"""Debian's docker-registry beside the control plane, with a login: what pods with ``imagePullSecrets`` pull from."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.fleet.control import ADDRESS, ControlPlane, Program, eventually
from tests.images.test_registry import HTPASSWD
from tests.real.appliance import busybox_archive

HOST = f"{ADDRESS}:5000"
"""Plain HTTP; hosts of the fleet are configured for it."""
IMAGE = f"{HOST}/private/busybox:v1"
USER, PASSWORD = "ann", "secret"


@contextmanager
def registry(control: ControlPlane) -> Iterator[None]:
    """With IMAGE in it. Skips without the Debian packages."""
    for program in ("docker-registry", "skopeo"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    directory = control.directory / "registry"
    directory.mkdir()
    (directory / "htpasswd").write_bytes(HTPASSWD)
    (directory / "busybox.tar").write_bytes(busybox_archive())
    (directory / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {directory}/blobs}}}}\n"
        f"auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}\nhttp: {{addr: '{HOST}'}}\n"
    )
    server = Program("registry", control.namespace, directory)
    server.start("docker-registry", "serve", str(directory / "registry.yml"))
    push = control.namespace.command(
        "skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", f"--dest-creds={USER}:{PASSWORD}",
        f"docker-archive:{directory}/busybox.tar", f"docker://{IMAGE}",
    )  # fmt: skip
    try:
        eventually(lambda: subprocess.run(push, capture_output=True).returncode == 0, "the image is pushed", server)
        yield
    finally:
        server.end(kill=True)


def login(name: str, namespace: str, password: str = PASSWORD) -> dict[str, Any]:
    """A Secret, as `kubectl create secret docker-registry` makes it."""
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/dockerconfigjson",
        "metadata": {"name": name, "namespace": namespace},
        "stringData": {".dockerconfigjson": json.dumps({"auths": {HOST: {"auth": auth}}})},
    }
