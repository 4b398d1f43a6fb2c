"""The host as a node of a Kubernetes cluster: the program ``hypeman node``."""
