"""The implementation of each command, one file per family.

Each is a function of an Owned instance, so it can only run in the instance's task (lifecycle.py), after the
legality check there (model/admission.py):

    boot.py      create, start
    stop.py      stop, delete, and the unrequested end of a VM
    standby.py   standby, restore
    copies.py    fork, snapshot, and restore from a snapshot
    volumes.py   attach, detach

../settle.py resolves those interrupted by a crash.
"""
