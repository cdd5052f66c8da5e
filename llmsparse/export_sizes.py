"""What an export weighs beside its source, by its matrices: the figures that every target reports."""

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

from llmsparse.checkpoint import Checkpoint


class Stored(NamedTuple):
    """One matrix of the checkpoint as an export stores it."""

    source: str  # its tensor in the checkpoint
    layout: str  # how it is stored, in the format's own words
    bytes: int  # that it takes there
    table: bool = False  # an embedding, or the output layer


def sizes(checkpoint: Checkpoint, matrices: Iterable[Stored]) -> dict[str, Any]:
    """``bytes`` (before; after is 0 until the files are there), ``linear`` and ``embeddings`` (before, after),
    ``linear_parameters``, ``bits_per_weight`` and ``layouts`` (how many matrices each has)."""
    matrices = list(matrices)
    parts: dict[str, Any] = {}
    for key, table in (("linear", False), ("embeddings", True)):
        part = [matrix for matrix in matrices if matrix.table is table]
        before = sum(checkpoint.bytes(matrix.source) for matrix in part)
        parts[key] = {"before": before, "after": sum(matrix.bytes for matrix in part)}
    parameters = sum(prod(checkpoint.shape(matrix.source)) for matrix in matrices if not matrix.table)
    return {
        "bytes": {"before": sum(file.stat().st_size for file in checkpoint.files), "after": 0},
        **parts,
        "linear_parameters": parameters,
        "bits_per_weight": 8 * parts["linear"]["after"] / max(parameters, 1),
        "layouts": dict(Counter(matrix.layout for matrix in matrices)),
    }
