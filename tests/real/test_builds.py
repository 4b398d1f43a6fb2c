"""An image is built in a real guest from a Dockerfile with what people use, and runs. Skipped where there is no builder
image: `make builder-image`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.builds.guest import BASE, build, building, files_with, output_of
from tests.real.kind import PATIENCE

pytestmark = [pytest.mark.real, pytest.mark.slow]

SECRET = "a very secret word"
DOCKERFILE = """
FROM scratch AS base
COPY bin/busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]

FROM base AS build
ARG NAME=nobody
RUN --mount=type=secret,id=word --mount=type=cache,target=/cache \\
    wc -c < /run/secrets/word > /size && date +%s%N >> /cache/runs && cat /run/secrets/word
RUN <<EOF
echo "hello $NAME, $(cat /size) bytes" > /hello
EOF

FROM base
COPY --from=build /hello /hello
CMD ["cat", "/hello"]
"""


async def test_a_build_runs_and_keeps_its_secret(directory: Path) -> None:
    async with building(directory) as appliance:
        await appliance.post("/builders", {"id": "kept", "disk_size_gb": 2})
        fields: dict[str, Any] = {
            "image_name": "team/hello:v1",
            "image_names": ["team/hello:latest"],
            "builder_id": "kept",
            "build_args": {"NAME": "you"},
            "secrets": [{"id": "word", "value": SECRET}],
        }
        files: dict[str, bytes | str | Path] = {**BASE, "Dockerfile": DOCKERFILE}
        done, log = await build(appliance, files, **fields)
        assert done["status"] == "ready", (done["error"], log)
        assert done["image_ref"] == "docker.io/team/hello:v1" and done["provenance"]["buildkit_version"]
        assert f"hello you, {len(SECRET)} bytes" in await output_of(appliance, "team/hello", "hello")
        assert any("***" in line for line in log) and not any(SECRET in line for line in log)

        again, log = await build(appliance, files, **fields)
        assert again["image_digest"] == done["image_digest"], "nothing has changed"
        assert any(line.endswith("CACHED") for line in log)
        with trio.fail_after(PATIENCE):  # its VM goes after its record says ready
            while await appliance.get("/instances"):
                await trio.sleep(0.1)
        assert not appliance.vmms()
        volumes = [volume["id"] for volume in await appliance.get("/volumes")]
        assert volumes == ["builder-kept"]
        assert files_with(appliance.data, SECRET.encode()) == []
