"""The API that a cluster calls on its nodes: logs, exec, attach, port-forward, statistics."""
