"""What each command does, one file a family.

Each is a function of an Owned instance, so it can only run in the instance's task (lifecycle.py), after it was
found legal there (admission.py):

    boot.py      create, start
    stop.py      stop, delete, and the end of a VM that nobody asked for
    standby.py   standby, restore
    copies.py    fork, snapshot, and back to a snapshot
    volumes.py   attach, detach

What became of one that a crash cut short is decided in ../settle.py.
"""
