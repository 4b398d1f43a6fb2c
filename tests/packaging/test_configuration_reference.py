"""systemd/CONFIGURATION.md says what hypeman/config.py does, and every key says what it means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_what_the_types_say() -> None:
    argv = [sys.executable, str(ROOT / "packaging" / "configuration-reference"), "--print"]
    told = subprocess.run(argv, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout == (ROOT / "systemd/CONFIGURATION.md").read_text(), "type: make reference"
