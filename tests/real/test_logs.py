"""What a guest prints, as many followers see it: every line, in order, none lost, and the server's memory flat.

``HYPEMAN_TEST_LOG=24x100`` has 24 followers and 100 MB, during which the log is rotated.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import httpx
import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance

pytestmark = [pytest.mark.real, pytest.mark.slow]

FOLLOWERS, MEGABYTES = (int(number) for number in os.environ.get("HYPEMAN_TEST_LOG", "6x2").split("x"))
PAD = "x" * 90
LINES = MEGABYTES * 10_000
"""Of 100 bytes."""
PRINT = f'awk "BEGIN {{ while (i < {LINES}) printf \\"%09d {PAD[:-1]}\\n\\", i++ }}"'


async def test_followers(appliance: Appliance) -> None:
    # It waits for the go, so that no reader comes late.
    await appliance.create("one", cmd=["sh", "-c", f"echo ready; until [ -e /go ]; do sleep 0.2; done; {PRINT}"])
    expected = hashlib.md5(usedforsecurity=False)
    for number in range(LINES):
        expected.update(b'data: "%09d %s"\n\n' % (number, PAD[:-1].encode()))
    size = LINES * len(b'data: "%09d %s"\n\n' % (0, PAD[:-1].encode()))
    digests: list[str] = []
    following = [trio.Event() for _ in range(FOLLOWERS)]
    peak = 0

    async def follow(begun: trio.Event) -> None:
        nonlocal peak
        digest, left, head = hashlib.md5(usedforsecurity=False), size, b""
        transport = httpx.AsyncHTTPTransport(uds=str(appliance.socket), verify=False)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://hypeman", timeout=None, trust_env=False) as client,
            client.stream("GET", "/instances/one/logs", params={"follow": "true", "tail": "10"}) as stream,
        ):
            async for chunk in stream.aiter_raw():
                if not begun.is_set():
                    head += chunk  # the kernel may have said something, too
                    _, ready, chunk = head.partition(b'data: "ready"\n\n')
                    if not ready:
                        continue
                    begun.set()
                digest.update(chunk[:left])
                left -= min(left, len(chunk))
                peak = max(peak, memory(appliance))
        assert left == 0, f"a follower missed at least {left} of {size} bytes"
        digests.append(digest.hexdigest())

    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            for begun in following:
                nursery.start_soon(follow, begun)
            for begun in following:
                await begun.wait()
        before = memory(appliance)
        assert (await appliance.exec("one", "touch", "/go"))[0] == 0
        with trio.fail_after(PATIENCE + 30 * MEGABYTES):
            while (await appliance.get("/instances/one"))["state"] != "Stopped":
                await trio.sleep(0.5)
        await appliance.delete("/instances/one")  # which ends the streams, once they have said everything
    assert digests == [expected.hexdigest()] * FOLLOWERS
    assert peak - before < 64 << 20, f"the server's memory grew from {before} to {peak} bytes"
    print(f"{FOLLOWERS} followers, {MEGABYTES} MB: the server's memory went from {before} to at most {peak} bytes")


def memory(appliance: Appliance) -> int:
    """Bytes that the server has resident."""
    return int(Path(f"/proc/{appliance.pid}/statm").read_text().split()[1]) * 4096
