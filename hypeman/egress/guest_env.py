"""Environment variables that make programs in a guest find the proxy and trust its authority. Pure.

Redirection does not need any of it; programs that look there fail more readably, and programs that bring their own
roots trust nothing else. Variables that *replace* a program's roots point at the system's bundle with our CA in it,
else every host that is passed through unread would be refused; `NODE_EXTRA_CA_CERTS` adds to what Node has.
"""

from __future__ import annotations

REPLACING = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO", "DENO_CERT", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)  # fmt: skip


def trust_environment(bundle: str, authority: str) -> dict[str, str]:
    """``bundle``: the guest's path of system roots and our CA in one file; ``authority``: of our CA alone."""
    return dict.fromkeys(REPLACING, bundle) | {"NODE_EXTRA_CA_CERTS": authority, "NODE_USE_SYSTEM_CA": "1"}


def proxy_environment(gateway: str, port: int, *, direct: tuple[str, ...] = ()) -> dict[str, str]:
    """HTTP_PROXY and its kin in both cases: curl reads only the lower-case one. ``direct``: hosts without proxy."""
    proxy = f"http://{gateway}:{port}"
    bypass = ",".join(("localhost", "127.0.0.1", "::1", gateway, *direct))
    named = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": bypass}
    return named | {name.lower(): value for name, value in named.items()}
