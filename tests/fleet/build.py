"""Builds the control plane of Kubernetes that tests/fleet runs, and prints the directory with its programs.

    python -m tests.fleet.build     build it, unless it is there (some 13 CPU minutes, once; 150 MB)

The sources come through the Go module proxy, at the versions and checksums of ``controlplane/go.mod`` and ``go.sum``.
Cached by content, like the guest kernel: the directory's name holds a hash of all that goes in.

    controlplane     etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl and metrics-server, by its
                     first argument
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "controlplane"
RECIPE = 1
"""Raised when what this program makes changes."""
_VERSION = "k8s.io/component-base/version"


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hypeman-build"


def version() -> str:
    """Of Kubernetes, as v1.37.2."""
    found = re.search(r"^\tk8s\.io/kubernetes (v\S+)$", (SOURCE / "go.mod").read_text(), re.MULTILINE)
    assert found is not None, "go.mod requires k8s.io/kubernetes"
    return found[1]


def directory() -> Path:
    """Where the finished programs of this recipe are, or will be."""
    content = b"".join((SOURCE / name).read_bytes() for name in ("go.mod", "go.sum", "main.go"))
    recipe = hashlib.sha256(content + str(RECIPE).encode()).hexdigest()[:12]
    return cache() / f"controlplane-{version()}-{recipe}"


def missing() -> str:
    """Why the programs cannot be used, or nothing."""
    return "" if directory().is_dir() else "there is no control plane; `make control-plane` builds it"


def build(work: Path) -> None:
    """Compile into ``work``. Raises CalledProcessError, FileNotFoundError without Go."""
    major, minor = version().removeprefix("v").split(".")[:2]
    names = {"gitVersion": version(), "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    flags = " ".join(["-s -w", *(f"-X {_VERSION}.{name}={value}" for name, value in names.items())])
    command = ["nice", "go", "build", "-trimpath", "-ldflags", flags, "-o", str(work / "controlplane"), "."]
    subprocess.run(command, cwd=SOURCE, env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": ""}, check=True)


def main() -> None:
    done = directory()
    if not done.is_dir():
        done.parent.mkdir(parents=True, exist_ok=True)
        with open(cache() / "controlplane.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.is_dir():
                work = Path(tempfile.mkdtemp(prefix="controlplane.", dir=cache()))
                try:
                    build(work)
                    work.rename(done)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    print(done)


if __name__ == "__main__":
    main()
