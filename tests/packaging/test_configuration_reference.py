"""systemd/CONFIGURATION.md says what hypeman/config.py does, and every key says what it means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_what_the_types_say() -> None:
    argv = [sys.executable, str(ROOT / "packaging" / "configuration-reference"), "--print"]
    completed = subprocess.run(argv, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == (ROOT / "systemd/CONFIGURATION.md").read_text(), "type: make reference"
