"""An engine whose data plane was built with sanitizers , see test_sanitized.py.

It keeps its rights: the sanitizers read files, and reserve more memory than can be locked.
"""

from __future__ import annotations

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("hypeman._native._egress_c", os.environ["HYPEMAN_EGRESS_SO"])
assert _spec is not None and _spec.loader is not None
sys.modules["hypeman._native._egress_c"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["hypeman._native._egress_c"])

from hypeman.egress.engine import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), confine=lambda uid: True))
