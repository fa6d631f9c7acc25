"""Gridmill pools GPUs that belong to different owners into one inference service."""

__version__ = "0.1.0"
