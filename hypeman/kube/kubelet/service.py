"""Serves the kubelet's API of this node: HTTPS, with a certificate that the cluster has signed."""

from __future__ import annotations

import logging
import ssl
import tempfile
from pathlib import Path

import trio

from hypeman.kube.kubelet.app import Kubelet
from hypeman.kube.kubelet.auth import Gate
from hypeman.kube.kubelet.certificates import SERVING_SIGNER, Identity, Keeper, Pair, self_signed
from hypeman.kube.site import PodTable, Site
from hypeman.server.serve import Server, bind_tcp

log = logging.getLogger(__name__)

FILE = "kubelet-serving.pem"


async def serve(
    site: Site,
    pods: PodTable,
    data_dir: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Until it is cancelled. ``data_dir`` is where this host's server keeps its disks. Raises ServeError, OSError."""
    context = server_context(site.api.access.authorities())
    identity = Identity(site.name, SERVING_SIGNER, dns=(site.name,), addresses=(site.address,))
    keeper = Keeper(site.api, identity, site.state_dir / FILE, lambda pair: present(context, pair))
    present(context, keeper.load() or self_signed(identity))
    kubelet = Kubelet(site.name, Gate(site.api, site.name), pods, site.local, data_dir)
    sockets = bind_tcp("", site.port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await nursery.start(
            lambda task_status: Server(kubelet, tls=context).run(sockets, trio.Event(), task_status=task_status)
        )
        log.info("kubelet's API", extra={"port": site.port})
        task_status.started()


def server_context(authorities: str) -> ssl.SSLContext:
    """Knows clients by certificates of ``authorities`` (PEM); one without a certificate may have a token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=authorities)
    return context


def present(context: ssl.SSLContext, pair: Pair) -> None:
    """From the next connection on."""
    with tempfile.NamedTemporaryFile() as file:  # OpenSSL loads pairs from files only; mode 0600
        file.write(pair.pem)
        file.flush()
        context.load_cert_chain(file.name)
