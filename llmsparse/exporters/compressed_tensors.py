"""A folder for vLLM and transformers: codes of linear weights as compressed-tensors' `pack-quantized` stores them."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmsparse import pieces
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.heap import return_freed_memory
from llmsparse.packing import Candidate, Numbers, candidates
from llmsparse.pieces import Piece
from llmsparse.skeleton import Skeleton
from llmsparse.values import Values
from llmsparse.writer import Writer, disk_errors

NOTE = "no runtime of this format gains speed or memory from zeros: every weight is stored; a zipped download is smaller"
NAMES = {8: "W8A16", 4: "W4A16"}
EXTRA = Extra("compressed-tensors", {}, {"compressed-tensors": "0.15"})


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the codes weight by weight; tables and whatever has no codes stay as they are.

    Raises:
        UserError: weights are to be stored as floats, in several kinds of codes, or tables as codes.
    """
    begun = time.perf_counter()
    if embeddings not in (None, "keep"):
        raise UserError(
            f"--embeddings {embeddings} was asked for; compressed-tensors stores codes of linear layers alone, "
            "leave --embeddings out"
        )
    skeleton = Skeleton(checkpoint, trust_remote_code=trust_remote_code)
    numbers, found = Numbers(checkpoint, values, None), candidates(skeleton)
    chosen = [c for c in found.packable if not (c.table or c.head or c.transposed)]
    _refuse_left(skeleton, chosen)
    out = out.expanduser().absolute()
    spool = pieces.spool_of(out)
    pieces.clear(Writer(checkpoint, out, overwrite))
    progress.start("packing", len(chosen))
    kinds: dict[str, Values] = {}
    made: list[Piece] = []
    try:
        with disk_errors(out):
            spool.mkdir(parents=True)
        for candidate in chosen:
            drawn = numbers.of(candidate)
            kind, codes, scales = drawn if drawn is not None else (None, None, None)
            if kind is None or scales is None or codes is None:
                raise UserError(_no_codes(candidate, values))
            kinds[kind.name] = kind
            tensors = packed(candidate, kind, codes, scales)
            file = spool / f"{len(made)}.safetensors"
            with disk_errors(out):
                save_file(tensors, file)
            shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            made.append(Piece(candidate.source, (), shapes, file))
            checkpoint.close()
            return_freed_memory()
            progress.advance("packing", candidate.path)
        kind = _one(kinds)
        config = _config(skeleton, chosen, kind)
        result = _result(skeleton, made, kind, [*found.warnings, *numbers.warnings, NOTE])
        result |= {"values": numbers.describe(), "seconds": round(time.perf_counter() - begun, 2)}
        pieces.write(checkpoint, made, out, overwrite, config, result)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return result


def _refuse_left(skeleton: Skeleton, chosen: list[Candidate]) -> None:
    """Refuse a model of which some block's weight is no linear layer of its own: its runtimes expect codes there."""
    sources = {candidate.source for candidate in chosen}
    left = next((w.source for w in skeleton.weights if w.block is not None and w.source not in sources), None)
    if left is not None:
        raise UserError(
            f"--format compressed-tensors stores plain linear layers, and {left} is none (an expert, one of several "
            "tensors that the model joins, or a transposed matrix); use --format packed"
        )


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What transformers makes of the files: see ``llmsparse.transformers_check``."""
    from llmsparse.transformers_check import check

    return check(checkpoint, out, result, NOTE, **options) | {"notes": ["vLLM was not run"]}


def packed(candidate: Candidate, kind: Values, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The three tensors of a weight (out, in): codes with 2^(bits - 1) added, 32 / bits to an int32, the first lowest."""
    each = 32 // kind.bits
    filled = torch.nn.functional.pad(
        codes.to(torch.int64) + (1 << (kind.bits - 1)), (0, -codes.shape[1] % each)
    )
    shifts = torch.arange(each) * kind.bits
    words = (filled.view(len(codes), -1, each) << shifts).sum(2)
    return {
        f"{candidate.stem}.weight_packed": words.to(torch.int32),  # keeps the lower 32 bits
        f"{candidate.stem}.weight_scale": scales.to(torch.bfloat16).contiguous(),
        f"{candidate.stem}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def _no_codes(candidate: Candidate, values: str | None) -> str:
    asked = f"--values {values} was asked for, but" if values else f"{candidate.source} has no codes;"
    return f"{asked} compressed-tensors stores int8 or int4:G codes; give --values int8 or int4:64, or prune with it"


def _one(kinds: dict[str, Values]) -> Values:
    if len(kinds) > 1:
        raise UserError(
            f"the weights have codes of several kinds ({', '.join(sorted(kinds))}); compressed-tensors is written "
            "with one here: quantise the model with one --values"
        )
    return next(iter(kinds.values()))


def _config(skeleton: Skeleton, chosen: list[Candidate], kind: Values) -> dict[str, Any]:
    """``quantization_config``: one scheme for linear layers, and the layers that stay as they are."""
    done = {candidate.path for candidate in chosen}
    linear = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
    weights = {
        "num_bits": kind.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if kind.group is None else "group",
        "group_size": kind.group,
        "dynamic": False,
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [name for name in linear if name not in done],
    }


def _result(skeleton: Skeleton, made: list[Piece], kind: Values, warnings: list[str]) -> dict[str, Any]:
    """Linear weights as codes, tables as they were."""
    stored = [Stored(piece.source, NAMES[kind.bits], _bytes(piece)) for piece in made]
    tables = dict.fromkeys(skeleton.sources[f"{path}.weight"][0][0] for path in skeleton.tables)
    stored += [Stored(name, "ordinary", skeleton.checkpoint.bytes(name), True) for name in tables]
    return {"format": "compressed-tensors", **sizes(skeleton.checkpoint, stored), "warnings": warnings}


def _bytes(piece: Piece) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in piece.tensors.values())
