"""Stacks: several instances, their volumes and ingresses, described in one file."""
