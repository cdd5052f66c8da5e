"""The zeros of a checkpoint: each weight's sparsity and the strictest n:m pattern that it satisfies."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.packed import VERSION, Packed

GROUPS = (2, 4, 8, 16)  # the m of n:m that are looked for
PIECE = 1 << 24  # elements looked at together; bounds the memory beside the tensor itself


def inspect(
    model: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | None = None
) -> dict[str, Any]:
    """Read a checkpoint tensor by tensor and measure the zeros of its weights.

    ``model`` is a hub id or a local folder. Returns ``weights``: name, shape, dtype, sparsity, pattern and
    negative_zeros of each tensor with two dimensions (or three: stacked experts); and ``totals`` over those
    and over all parameters. A pattern runs along the last dimension, or along the one before it, as in
    GPT-2's transposed weights: ``2:4 (columns)``. It says what holds, not what was intended: a weight pruned
    without a pattern may keep 15 of every 16 by chance. Raises UserError when ``model`` is no checkpoint.
    """
    checkpoint = Checkpoint.open(model, revision=revision, token=token, cache_dir=cache_dir)
    weights, parameters, zeros = [], 0, 0
    try:
        for name, dtype, tensor in _tensors(checkpoint):
            row = _measure(tensor)
            parameters += tensor.numel()
            zeros += row["zeros"]
            if tensor.ndim in (2, 3):
                weights.append({"name": name, "shape": list(tensor.shape), "dtype": dtype, **row})
    finally:
        checkpoint.close()
    return {"model": str(model), "weights": weights, "totals": _totals(weights, parameters, zeros)}


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str, Tensor]]:
    """Name, what it is stored as, and values of each tensor that holds weights; packed ones are unpacked."""
    packed = packed_weights(checkpoint) if checkpoint.is_packed else {}
    parts = {f"{stem}.{part}" for stem, weight in packed.items() for part in weight.tensors()}
    for name in checkpoint.names():
        if name not in parts and checkpoint.dtype(name).is_floating_point:  # others are buffers
            tensor = checkpoint.tensor(name)
            yield name, str(tensor.dtype).removeprefix("torch."), tensor
    for stem, weight in packed.items():
        tensors = {part: checkpoint.tensor(f"{stem}.{part}") for part in weight.tensors()}
        weight.check(stem, tensors)
        stored = f"{weight.values} ({weight.layout})"
        yield f"{stem}.weight", stored, weight.dense(tensors)


def packed_weights(checkpoint: Checkpoint) -> dict[str, Packed]:
    """The packed weights by what their tensors' names begin with on disk, which may lack the module path's prefix.

    Raises:
        UserError: config.json or the files are not what docs/format.md says.
    """
    config = json.loads((checkpoint.folder / "config.json").read_text("utf-8"))["quantization_config"]
    if config.get("version") != VERSION or not isinstance(config.get("weights"), dict):
        raise UserError(
            f"{checkpoint.folder}: packed format version {config.get('version')!r} is unknown or without weights; "
            f"this llmsparse reads version {VERSION}"
        )
    names, found = set(checkpoint.names()), {}
    for path, entry in config["weights"].items():
        weight = Packed.parse(path, entry)
        first = next(iter(weight.tensors()))
        stems = [path[cut:] for cut in (0, *(i + 1 for i, c in enumerate(path) if c == "."))]
        stem = next((stem for stem in stems if f"{stem}.{first}" in names), path)
        headers = {p: f"{stem}.{p}" for p in weight.tensors() if f"{stem}.{p}" in names}
        weight.check_shapes(path, {p: (checkpoint.dtype(n), checkpoint.shape(n)) for p, n in headers.items()})
        found[stem] = weight
    return found


def _totals(weights: list[dict[str, Any]], parameters: int, zeros: int) -> dict[str, Any]:
    sizes = [torch.Size(weight["shape"]).numel() for weight in weights]
    weight_zeros = sum(weight["zeros"] for weight in weights)
    return {
        "parameters": parameters,
        "zeros": zeros,
        "sparsity": zeros / max(parameters, 1),
        "weight_parameters": sum(sizes),
        "weight_zeros": weight_zeros,
        "weight_sparsity": weight_zeros / max(sum(sizes), 1),
        "negative_zeros": sum(weight["negative_zeros"] for weight in weights),
    }


def _measure(tensor: Tensor) -> dict[str, Any]:
    """Zeros, negative zeros, sparsity and strictest pattern of one tensor."""
    zeros, negative = 0, 0
    kept: dict[tuple[int, int], int] = {}  # (dimension, m) -> the most kept in any group
    for piece in _pieces(tensor):
        zero = piece == 0
        zeros += int(zero.sum())
        negative += int((zero & piece.signbit()).sum())
        for dim in (-1, -2) if tensor.ndim in (2, 3) else ():
            for m, most in _most_kept(~zero, dim, tensor.shape[dim]).items():
                kept[dim, m] = max(kept.get((dim, m), 1), most)
    return {
        "zeros": zeros,
        "sparsity": zeros / max(tensor.numel(), 1),
        "pattern": _strictest(kept),
        "negative_zeros": negative,
    }


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as matrices of few enough whole groups of rows, in a dtype that can be compared."""
    matrices = (
        tensor if tensor.ndim == 3 else tensor.reshape(1, -1, tensor.shape[-1] if tensor.ndim > 1 else 1)
    )
    rows = max(PIECE // max(matrices.shape[-1], 1) // max(GROUPS), 1) * max(GROUPS)
    for matrix in matrices:
        for piece in matrix.split(rows):
            yield piece.float() if piece.dtype.itemsize == 1 else piece


def _most_kept(kept: Tensor, dim: int, size: int) -> dict[int, int]:
    """For each m that divides ``size``: the most True in any m consecutive entries along ``dim``."""
    counts, most = kept.to(torch.uint8).transpose(dim, -1), {}
    for m in GROUPS:
        if size % m or not counts.numel():
            break  # each m doubles the one before
        counts = counts[..., ::2] + counts[..., 1::2]
        most[m] = int(counts.max())
    return most


def _strictest(kept: dict[tuple[int, int], int]) -> str | None:
    """The pattern of the smallest density, then of the smallest m, then along the last dimension."""
    found = [(n / m, m, dim != -1, n) for (dim, m), n in kept.items() if n < m]
    if not found:
        return None
    _, m, columns, n = min(found)
    return f"{n}:{m} (columns)" if columns else f"{n}:{m}"
