"""Low-rank compensation without training: an adapter that takes most of what pruning left of each layer's error."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.skeleton import Skeleton, Weight
from llmsparse.statistics import Gram, SquaredNorm

FOLDER = "adapter"
NAME = f"{FOLDER}/adapter_model.safetensors"
CONFIG = f"{FOLDER}/adapter_config.json"


class Adapter(NamedTuple):
    """``up`` (out, rank) @ ``down`` (rank, in) is added to a weight, and leaves the share ``left`` of its error."""

    down: Tensor
    up: Tensor
    left: float


def compensate(error: Tensor, statistics: Gram | SquaredNorm | None, rank: int) -> Adapter:
    """The B A of ``rank`` with the least |(E - B A) X|^2, ``error`` E (out, in) being what is missing of a weight.

    B are the first left singular vectors of E X, and A = BT E (EoRA, arXiv 2410.21271, which goes through the
    eigenvectors of X XT). Of inputs whose norms alone are known, X is diagonal; without any, the identity.
    """
    rank = min(rank, *error.shape)
    rows, columns = error.shape
    moments = _moments(error, statistics)
    if rows <= columns:
        squares = error @ (
            moments @ error.T if moments.dim() == 2 else moments[:, None] * error.T
        )  # E X XT ET
        found, vectors = torch.linalg.eigh(squares)
        up = vectors[:, -rank:]
    else:
        seen = error @ _root(moments) if moments.dim() == 2 else error * moments.sqrt()
        found, vectors = torch.linalg.eigh(seen.T @ seen)
        up = torch.linalg.qr(seen @ vectors[:, -rank:]).Q
    whole = float(found.clamp(min=0).sum())
    left = float(found[:-rank].clamp(min=0).sum()) / whole if whole > 0 else 0.0
    return Adapter(up.T @ error, up, left)


def _moments(error: Tensor, statistics: Gram | SquaredNorm | None) -> Tensor:
    """The mean of x xT, (in, in), or its diagonal (in,)."""
    if statistics is None or statistics.tokens == 0:
        return error.new_ones(error.shape[1])
    found = statistics.matrix if isinstance(statistics, Gram) else statistics.value
    return found.to(error)


def _root(moments: Tensor) -> Tensor:
    """A matrix L with L LT = ``moments``; by eigenvectors, for no rounding of a Gram makes those fail."""
    found, vectors = torch.linalg.eigh(moments)
    return vectors * found.clamp(min=0).sqrt()


def modules(skeleton: Skeleton, weights: list[Weight]) -> dict[str, str]:
    """Weight name -> the path of the module that an adapter goes to, of those that PEFT can adapt.

    Experts and weights that are parts of one matrix in memory are none.
    """
    whole = [
        w for w in weights if w.index is None and len(skeleton.sources[w.parameter]) == 1 and w.expert is None
    ]
    return {w.name: w.parameter.removesuffix(".weight") for w in whole if w.parameter.endswith(".weight")}


def keys(path: str) -> tuple[str, str]:
    """What PEFT calls the two matrices of the module ``path``: down, up."""
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"


def layout(
    weights: dict[str, Weight], paths: dict[str, str], rank: int, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The adapter file's tensors, name -> dtype and shape."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, path in paths.items():
        rows, columns = weights[name].out_features, weights[name].in_features
        own, (down, up) = min(rank, rows, columns), keys(path)
        found[down], found[up] = (dtype, (own, columns)), (dtype, (rows, own))
    return found


def write_config(
    folder: Path, weights: dict[str, Weight], paths: dict[str, str], rank: int, base: str
) -> None:
    """The adapter's config as PEFT reads it: nothing is scaled, each module has its own name."""
    narrow = {
        p: n for w, p in paths.items() if (n := min(weights[w].out_features, weights[w].in_features)) < rank
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(weights[name].transposed for name in paths),
        "target_modules": sorted(paths.values()),
        "rank_pattern": narrow,
        "alpha_pattern": narrow,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
