"""Environment variables that make programs in a guest find the proxy and trust its authority. Pure.

Redirection works without them, but programs that read them report clearer errors, and programs with bundled roots
need them to trust our CA. Variables that *replace* a program's roots point at the system's bundle plus our CA,
otherwise every passed-through host would be refused; `NODE_EXTRA_CA_CERTS` adds to Node's roots.
"""

from __future__ import annotations

REPLACING = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO", "DENO_CERT", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)  # fmt: skip


def trust_environment(bundle: str, authority: str, *, postgres: bool = False) -> dict[str, str]:
    """``bundle``: guest path of the system roots plus our CA; ``authority``: guest path of our CA alone.

    ``postgres``: it logs in to Postgres through the proxy. Otherwise libpq is left alone: with a file of roots it
    verifies even where ``sslmode`` is ``require``, and certificates of databases often come from no public CA.
    """
    replacing = (*REPLACING, "PGSSLROOTCERT") if postgres else REPLACING
    return dict.fromkeys(replacing, bundle) | {"NODE_EXTRA_CA_CERTS": authority, "NODE_USE_SYSTEM_CA": "1"}


def proxy_environment(gateway: str, port: int, *, direct: tuple[str, ...] = ()) -> dict[str, str]:
    """HTTP_PROXY etc. in upper and lower case (curl reads only lower case). ``direct``: hosts that bypass the proxy."""
    proxy = f"http://{gateway}:{port}"
    bypass = ",".join(("localhost", "127.0.0.1", "::1", gateway, *direct))
    named = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": bypass}
    return named | {name.lower(): value for name, value in named.items()}
