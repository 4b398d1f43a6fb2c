"""Whom the server trusts as a TLS client: the certificates of the host's distribution."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from functools import cache, partial

CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Distributions' CA bundle paths; a bundled OpenSSL has only its build machine's path."""


def client_context(ca_file: str = "") -> ssl.SSLContext:
    """Verifies servers by the host's CA roots plus those in ``ca_file``. Raises OSError if that cannot be read."""
    context = ssl.create_default_context(cafile=next((path for path in CA_FILES if os.path.exists(path)), None))
    context.load_default_certs()
    if ca_file:
        context.load_verify_locations(ca_file)
    return context


def client_context_later(ca_file: str = "") -> Callable[[], ssl.SSLContext]:
    """The same, made when it is first called: the host's roots take some 40 ms and 2 MB. With ``ca_file`` it is made
    now, so that one that cannot be read is noticed."""
    make = cache(partial(client_context, ca_file))
    if ca_file:
        make()
    return make
