"""First thing in the bundle: take the variables that ``ext/start`` and the bootloader set out of our environment."""

import os

for name in [name for name in os.environ if name.startswith("_PYI_")]:
    del os.environ[name]
