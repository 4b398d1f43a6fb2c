"""A real control plane of Kubernetes in a network namespace: etcd, API server, controller manager, scheduler.

    with ControlPlane(directory) as control:
        control.kubectl("get", "nodes")

Certificates come from one CA, which is made here; the API server verifies those of the nodes. Everything is in
``directory`` and in the namespace, and is gone at the end.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.fleet import build
from tests.real.appliance import Namespace

T = TypeVar("T")

ADDRESS = "10.87.0.1"
"""Of the control plane on the bridge; hosts are .11 and following."""
SERVER = f"https://{ADDRESS}:6443"
PATIENCE = 300.0
"""Seconds until a wait counts as a hang; a busy machine is slow, not wrong."""
GRACE_SECONDS = 15
"""Without a heartbeat, after which a node counts as gone."""
VALID = timedelta(days=10)
"""Of certificates, before and after now."""


class Authority:
    """A CA that writes certificates as files; its own is ``name``.pem. All are valid for some days before and after
    now, as those of a cluster are, so that a host whose clock is off by days can use them."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fleet {name}")])
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(Encoding.PEM)
        self._write(name, self.pem, self._key)

    def issue(
        self, file: str, name: str, *groups: str, addresses: tuple[str, ...] = (), hosts: tuple[str, ...] = ()
    ) -> None:
        """``file``.pem and ``file``.key."""
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name(subject), key).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
        names += [x509.DNSName(each) for each in hosts]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        self._write(file, builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM), key)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - VALID)
            .not_valid_after(now + VALID)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def _write(self, file: str, certificate: bytes, key: ec.EllipticCurvePrivateKey) -> None:
        (self.directory / f"{file}.pem").write_bytes(certificate)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.directory / f"{file}.key").write_bytes(pem)


class Program:
    """A process in a namespace, with a log."""

    def __init__(self, name: str, namespace: Namespace, directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._namespace = namespace
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *argv: str, **environ: str) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._namespace.command(*argv), stdout=log, stderr=log, env={**os.environ, **environ}
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, *, kill: bool = False) -> None:
        """SIGTERM, or SIGKILL; waits. Of no effect if it does not run."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


class ControlPlane:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.programs = build.directory()
        self.namespace = Namespace()
        for command in (
            "ip link add br0 type bridge",
            f"ip addr add {ADDRESS}/24 dev br0",
            "ip link set br0 up",
        ):
            self.namespace.run(*command.split())
        self.authority = Authority(directory)
        self.authority.issue("apiserver", "kube-apiserver", addresses=(ADDRESS, "127.0.0.1", "10.96.0.1"))
        Authority(directory, "front-proxy-ca").issue("front-proxy", "front-proxy")
        self.authority.issue("admin", "admin", "system:masters")
        self.authority.issue("kubelet-client", "kube-apiserver-kubelet-client", "system:masters")
        for name in ("controller-manager", "scheduler"):
            self.authority.issue(name, f"system:kube-{name}")
        self._write_service_account_key()
        for name in ("admin", "controller-manager", "scheduler"):
            pair = {
                "client-certificate-data": self.encoded(f"{name}.pem"),
                "client-key-data": self.encoded(f"{name}.key"),
            }
            self.write_kubeconfig(name, pair)
        self.etcd = Program("etcd", self.namespace, directory)
        self.apiserver = Program("apiserver", self.namespace, directory)
        self.controllers = Program("controllers", self.namespace, directory)
        self.scheduler = Program("scheduler", self.namespace, directory)

    def __enter__(self) -> ControlPlane:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self.etcd.start(
            *self.program("etcd"),
            f"--data-dir={self.directory}/etcd",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--log-level=warn",
            "--unsafe-no-fsync",
        )
        self.start_apiserver()
        self.controllers.start(
            *self.program("kube-controller-manager"),
            *self._as("controller-manager"),
            f"--cluster-signing-cert-file={self.directory}/ca.pem",
            f"--cluster-signing-key-file={self.directory}/ca.key",
            f"--root-ca-file={self.directory}/ca.pem",
            f"--service-account-private-key-file={self.directory}/sa.key",
            "--use-service-account-credentials",
            "--controllers=*,bootstrap-signer-controller,token-cleaner-controller",
            f"--node-monitor-grace-period={GRACE_SECONDS}s",
            "--node-monitor-period=2s",
            "--horizontal-pod-autoscaler-sync-period=5s",
            "--allocate-node-cidrs",
            "--cluster-cidr=10.88.0.0/16",
        )
        self.scheduler.start(*self.program("kube-scheduler"), *self._as("scheduler"))

    def start_apiserver(self) -> None:
        """Returns once it is ready."""
        certificates = self.directory
        self.apiserver.start(
            *self.program("kube-apiserver"),
            "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={ADDRESS}",
            "--secure-port=6443",
            "--service-cluster-ip-range=10.96.0.0/16",
            f"--tls-cert-file={certificates}/apiserver.pem",
            f"--tls-private-key-file={certificates}/apiserver.key",
            f"--client-ca-file={certificates}/ca.pem",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={certificates}/sa.pub",
            f"--service-account-signing-key-file={certificates}/sa.key",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--enable-bootstrap-token-auth",
            f"--kubelet-client-certificate={certificates}/kubelet-client.pem",
            f"--kubelet-client-key={certificates}/kubelet-client.key",
            f"--kubelet-certificate-authority={certificates}/ca.pem",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={certificates}/front-proxy-ca.pem",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={certificates}/front-proxy.pem",
            f"--proxy-client-key-file={certificates}/front-proxy.key",
            "--enable-aggregator-routing",
            "--profiling=false",
        )
        eventually(lambda: self._run("get", "--raw=/readyz").stdout == "ok", "the API server is ready", self.apiserver)

    def close(self) -> None:
        for program in (self.scheduler, self.controllers, self.apiserver, self.etcd):
            program.end(kill=True)
        self.namespace.remove()

    # ── Asking ──────────────────────────────────────────────────────────────────────────────────

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """Its output; fails with its error."""
        done = self._run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def try_kubectl(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self._run(*arguments, stdin=stdin)

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        body = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(body))

    def command(self, *arguments: str) -> list[str]:
        """kubectl as the administrator, for a process of one's own."""
        admin = f"--kubeconfig={self.directory}/admin.conf"
        return self.namespace.command(*self.program("kubectl"), admin, *arguments)

    def _run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "HOME": str(self.directory)},
        )

    def memory(self) -> int:
        """Resident bytes of all four programs."""
        return sum(resident(each.pid) for each in (self.etcd, self.apiserver, self.controllers, self.scheduler))

    # ── Files ───────────────────────────────────────────────────────────────────────────────────

    def program(self, name: str) -> tuple[str, str]:
        return str(self.programs / "controlplane"), name

    def _as(self, name: str) -> tuple[str, ...]:
        file = f"{self.directory}/{name}.conf"
        own = (f"--kubeconfig={file}", "--leader-elect=false", "--profiling=false")
        return (*own, f"--authentication-kubeconfig={file}", f"--authorization-kubeconfig={file}")

    def _write_service_account_key(self) -> None:
        self.authority.issue("sa", "service accounts")
        key = load_pem_private_key((self.directory / "sa.key").read_bytes(), None)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (self.directory / "sa.pub").write_bytes(public)

    def write_kubeconfig(self, name: str, user: dict[str, str]) -> None:
        """``name``.conf, for one who proves to be ``user``."""
        tree = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fleet",
            "contexts": [{"name": "fleet", "context": {"cluster": "fleet", "user": name}}],
            "clusters": [
                {"name": "fleet", "cluster": {"server": SERVER, "certificate-authority-data": self.encoded("ca.pem")}}
            ],
            "users": [{"name": name, "user": user}],
        }
        (self.directory / f"{name}.conf").write_text(json.dumps(tree))

    def encoded(self, file: str) -> str:
        """Base64 of a file."""
        return base64.b64encode((self.directory / file).read_bytes()).decode()


def eventually(look: Callable[[], T], what: str, *programs: Program) -> T:
    """The first true value of ``look``. While it fails, it is asked again; at the end its failure is reported, with the
    logs of the ``programs``."""
    until = time.monotonic() + PATIENCE
    while True:
        problem: BaseException | None = None
        try:
            if found := look():
                return found
        except (AssertionError, KeyError, IndexError, subprocess.TimeoutExpired, ValueError) as error:
            problem = error
        ended = [each for each in programs if not each.runs]
        if time.monotonic() > until or ended:
            logs = "\n".join(f"--- {each.name}\n{each.tail()}" for each in programs)
            raise AssertionError(f"not within {PATIENCE:g} s: {what}: {problem or ''}\n{logs}") from problem
        time.sleep(0.2)


def resident(pid: int) -> int:
    """Bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def new_token() -> tuple[str, str]:
    """Id and secret of a bootstrap token."""
    return secrets.token_hex(3), secrets.token_hex(8)
