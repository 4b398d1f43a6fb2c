"""The pages that clients get instead of a guest's answer. Pure. They say nothing about instances or this host."""

from __future__ import annotations

_TITLES = {
    308: "Permanent Redirect",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def render_page(status: int, message: str, *, html: bool) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body. ``message`` is ours and needs no escaping."""
    title = f"{status} {_TITLES.get(status, 'Error')}"
    if html:
        text = (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
            f"<h1>{title}</h1><p>{message}</p></html>\n"
        )
    else:
        text = f"{title}: {message}\n"
    body = text.encode()
    headers = [
        (b"content-type", b"text/html; charset=utf-8" if html else b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    if status in (503, 504):
        headers.append((b"retry-after", b"5"))
    return headers, body


def render_bare(text: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body: the text and nothing else."""
    body = text.encode()
    return [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())], body
