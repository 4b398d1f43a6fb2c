"""Importing from a path on the server: the path travels, the archive does not."""

from __future__ import annotations

from typing import Any


def test_a_path_on_the_server(cli: Any, server: Any) -> None:
    done = cli("image", "import", "/srv/images/x.tar", "--on-server")
    assert done.exit_code == 1
    assert "/srv/images/x.tar is not below one of images.import_paths" in done.stderr
    assert not hasattr(server.world.images, "imported") or not server.world.images.imported
