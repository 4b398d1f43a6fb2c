"""Images pulled from Debian's docker-registry, to a disk that the kernel can read."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hypeman.images.types import CreateImageRequest, ImageStatus
from tests.images.conftest import Start, push
from tests.images.layout import ImageFiles, directory, entry, tar

pytestmark = pytest.mark.real


async def test_from_registry_to_ready(registry_host: str, make_images: Start, tmp_path: Path) -> None:
    """A name becomes pending at once and ready soon, with its config, and its disk has the files."""
    image = ImageFiles(
        [tar(directory("etc"), entry("etc/motd", data=b"hello\n" * 5000))],
        config={"Cmd": ["sh"], "Env": ["PATH=/bin", "A=b=c"], "WorkingDir": "/srv", "User": "7:8"},
    )
    push(image.write_layout(tmp_path / "oci"), f"{registry_host}/test/first:1")
    images = await make_images(insecure_registries=(registry_host,))
    answer = await images.create(CreateImageRequest(f"{registry_host}/test/first:1", tags={"a": "b"}))
    assert answer.status in (ImageStatus.PENDING, ImageStatus.PULLING)
    with trio.fail_after(20):
        ready = await images.wait_ready(f"{registry_host}/test/first:1")
    found = await images.get(f"{registry_host}/test/first:1")
    assert found.status is ImageStatus.READY and found.error is None
    assert found.digest == answer.digest == ready.digest
    assert found.cmd == ("sh",) and found.env == {"PATH": "/bin", "A": "b=c"} and found.working_dir == "/srv"
    assert found.tags == {"a": "b"} and found.platform == "linux/amd64"
    assert ready.config.user == "7:8" and ready.disk.stat().st_size == found.size_bytes
