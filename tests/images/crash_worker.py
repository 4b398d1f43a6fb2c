"""The worker, killed together with its server at a chosen write. Run by ``test_crash.py``."""

import os
import sys

from hypeman.images import worker
from tests.images.crash_points import Points

if __name__ == "__main__":
    fd, journal, at, server = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    worker.confine = lambda: None  # it must be able to kill its server
    Points(journal, at, victims=(server, os.getpid())).install()
    sys.exit(worker.main(fd))
