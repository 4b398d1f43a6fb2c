"""A volume made from an archive, as a guest sees it."""

from __future__ import annotations

import gzip
import tarfile

import pytest

from tests.images.layout import directory, entry, hard_link, symlink, tar
from tests.real.appliance import IMAGE, Appliance

pytestmark = [pytest.mark.real, pytest.mark.slow]


async def test_a_guest_sees_what_the_archive_says(appliance: Appliance) -> None:
    """Owners, modes, hard links, links and devices; and the file system takes what the guest writes."""
    data = tar(
        directory("d", uid=70000, gid=80000, mode=0o2750),
        entry("d/f", data=b"hello\n" * 9000, mode=0o4751, uid=1000),
        hard_link("d/g", "d/f"),
        symlink("/l", "d/f"),
        entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
        *(entry(f"many/{number}", data=b"x") for number in range(2000)),
    )
    made = await appliance.ask(
        "POST", "/volumes/from-archive", params={"name": "v", "size_gb": 1, "id": "v"}, content=gzip.compress(data)
    )
    assert made.status_code == 201, made.text
    await appliance.create("one", image=IMAGE, volumes=[{"volume_id": "v", "mount_path": "/data"}])
    look = "cd /data; stat -c '%n %a %u %g %h %F' d d/f null; ls many | wc -l; cmp d/f d/g && cmp l d/g && echo same"
    status, shown = await appliance.exec("one", "sh", "-c", look)
    assert status == 0 and shown.splitlines() == [
        "d 2750 70000 80000 2 directory",
        "d/f 4751 1000 0 2 regular file",
        "null 644 0 0 1 character special file",
        "2000",
        "same",
    ]
    write = "cd /data && echo more >> d/g && rm -r many && mkdir d/new && echo new > d/new/x && sync && tail -n 1 d/f"
    assert await appliance.exec("one", "sh", "-c", write) == (0, "more\n")
