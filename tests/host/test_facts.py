"""Facts about the host that are read from files which others write."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypeman.host.facts import VMM_UIDS, uid_conflicts


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (510_000, ["subordinate ids of grace (493216 to 558751)"]),
        (1_000, ["account ada (1000)"]),
        (900_000_000, []),
        (558_752, []),
        (493_216 - VMM_UIDS, ["subordinate ids of frank (427680 to 493215)"]),
        (0, []),
    ],
)
def test_user_ids_that_others_may_use_are_found(tmp_path: Path, base: int, expected: list[str]) -> None:
    (tmp_path / "passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n+nis\nodd:x:no\n"
    )
    (tmp_path / "subuid").write_text("frank:427680:65536\ngrace:493216:65536\nodd:x:65536\n# a comment\n\n")
    assert uid_conflicts(base, etc=tmp_path) == expected


def test_a_host_without_these_files_has_no_conflicts(tmp_path: Path) -> None:
    assert uid_conflicts(510_000, etc=tmp_path) == []
