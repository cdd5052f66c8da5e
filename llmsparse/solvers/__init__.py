"""Pruning methods, one a file; the folder listing is the registry."""
