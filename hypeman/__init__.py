"""Hypeman: OCI images as micro-VMs behind a REST API, on one host.

Start reading at ``__main__.py`` (the command), ``app.py`` (the life of the server) and ``wiring.py`` (its parts).
"""

__version__ = "0.1.0"

API_VERSION = "0.3.0"
"""Revision of the HTTP contract that this server implements."""
