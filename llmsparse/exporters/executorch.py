"""A program for ExecuTorch, which runs it on phones and other CPUs with XNNPACK: float32, or int8 weights."""

import shutil
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmsparse import executorch_model, executorch_program, export_check, export_report
from llmsparse.atomic import whole_folder
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.figures import byte_size
from llmsparse.packing import Candidate, Numbers, candidates
from llmsparse.skeleton import Skeleton
from llmsparse.writer import disk_errors

EXTRA = Extra("executorch", {"executorch": "1.5", "torchao": "0.18"})
FILE = "model.pte"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ROTARY = ("default", "linear", "llama3")  # the others depend on how long the text is
INT4 = (
    "XNNPACK multiplies int4 weights only with positive scales, and the scale of an int4 group is negative where its "
    "largest weight is; "
)


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write model.pte, tokenizer.json and export.json. The whole model is in memory, in float32.

    Raises:
        UserError: values that are neither fp32 nor int8, a model that is not known to run.
    """
    begun = time.perf_counter()
    config = checkpoint.config(trust_remote_code)
    _check_asked("--values", values, ("fp32", "int8"))
    _check_asked("--embeddings", embeddings, ("keep", "int8"))
    _check_family(config)
    numbers = _numbers(checkpoint, values, embeddings)
    skeleton = Skeleton(checkpoint, trust_remote_code=trust_remote_code)
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
    found = candidates(skeleton)
    coded = _put_codes(model, numbers, found.packable)
    made = list(_matrices(skeleton, model, coded))
    context = min(config.max_position_embeddings, export_check.CONTEXT)
    out = out.expanduser().absolute()
    with disk_errors(out), whole_folder(out) as work:
        progress.start("lowering", 1)
        inputs = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        module = executorch_model.OneToken(model, context).eval()
        executorch_program.lower(module, inputs, _told(config, context), work / FILE)
        progress.advance("lowering", FILE)
        _copy_tokenizer(checkpoint, work)
        result = {"format": "executorch", "file": FILE, "context": context, **sizes(checkpoint, made)}
        result["bytes"]["after"] = (work / FILE).stat().st_size
        dense = found.warnings if coded else []  # where nothing has codes, all is as it was
        result |= {
            "values": numbers.describe(),
            "constants": _keys(skeleton, model),
            "warnings": [*dense, *numbers.warnings, *_twice(skeleton, made)],
            "seconds": round(time.perf_counter() - begun, 2),
        }
        export_report.write(work, result)
    return result


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What the file is worth: see ``llmsparse.executorch_check``."""
    from llmsparse.executorch_check import check

    return check(checkpoint, out / result["file"], result, **options)


def _check_asked(option: str, asked: str | None, known: tuple[str, ...]) -> None:
    if asked is None or asked in known:
        return
    reason = INT4 if asked.startswith("int4:") else ""
    raise UserError(
        f"{option} {asked} was asked for; {reason}--format executorch stores {' or '.join(known)}, "
        "use one of them, or --format gguf or packed"
    )


def _check_family(config: Any) -> None:
    """Refuse a model whose program was never compared with transformers'."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{config.model_type} cannot be exported to ExecuTorch; known: {', '.join(FAMILIES)}; use --format packed"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]
    for kind in kinds:
        if kind.get("rope_type", "default") not in ROTARY:
            raise UserError(
                f"rotary embeddings of type {kind['rope_type']} cannot be exported to ExecuTorch; known: "
                f"{', '.join(ROTARY)}; use --format packed"
            )


def _numbers(checkpoint: Checkpoint, values: str | None, embeddings: str | None) -> Numbers:
    """Floats are float32 whatever they were; only codes are asked for.

    Raises:
        UserError: the codes beside the model are not int8.
    """
    numbers = Numbers(checkpoint, values, embeddings)
    if numbers.codes is None:
        return numbers if values == "int8" else Numbers(checkpoint, None, embeddings)
    for name in numbers.codes.names:
        if (grid := numbers.codes.grid(name)).bits != 8:
            raise UserError(
                f"{name} has {grid} codes beside the model; {INT4 if grid.bits == 4 else ''}--format executorch stores "
                "int8 codes: prune or quantize with --values int8, or delete grid.safetensors to store fp32"
            )
    return numbers


def _put_codes(model: nn.Module, numbers: Numbers, packable: list[Candidate]) -> set[str]:
    """Codes into the modules that have some; the disk tensors that they are of."""
    coded = set()
    for candidate in packable:
        if (drawn := numbers.of(candidate)) is None or drawn[2] is None:
            continue
        for path in (candidate.path, *candidate.tied):
            executorch_model.put_codes(model, path, drawn[1], drawn[2])
        coded.add(candidate.source)
    return coded


def _modules(skeleton: Skeleton, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Disk tensor and module of every matrix; a tied one once for each module."""
    for path, module in model.named_modules():
        matrix = isinstance(module, nn.Linear | nn.Embedding | executorch_model.CodedLinear)
        if matrix or isinstance(module, executorch_model.CodedEmbedding):
            yield skeleton.sources[f"{path}.weight"][0][0], module


def _matrices(skeleton: Skeleton, model: nn.Module, coded: set[str]) -> Iterator[Stored]:
    tables = {skeleton.sources[f"{path}.weight"][0][0] for path in skeleton.tables}
    copies: dict[str, int] = {}
    for source, _ in _modules(skeleton, model):
        copies[source] = copies.get(source, 0) + 1
    for source, count in copies.items():
        shape = skeleton.checkpoint.shape(source)
        size = prod(shape) + 4 * shape[0] if source in coded else 4 * prod(shape)
        yield Stored(source, "int8" if source in coded else "fp32", count * size, source in tables)


def _keys(skeleton: Skeleton, model: nn.Module) -> dict[str, str]:
    """Disk tensor -> the name that the file gives the weight of its linear layer."""
    found = {}
    for source, module in _modules(skeleton, model):
        if isinstance(module, nn.Linear):
            found[source] = executorch_program.key(module.weight)
        elif isinstance(module, executorch_model.CodedLinear):
            found[source] = executorch_program.key(module.codes)
    return found


def _told(config: Any, context: int) -> dict[str, Any]:
    """What ExecuTorch's own runners of language models ask a program."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    told = {
        "get_max_seq_len": context, "get_max_context_len": context, "get_vocab_size": config.vocab_size,
        "use_kv_cache": True, "use_sdpa_with_kv_cache": False, "enable_dynamic_shape": False,
        "get_bos_id": config.bos_token_id, "get_eos_ids": [end for end in ends if end is not None],
    }  # fmt: skip
    return {name: value for name, value in told.items() if value is not None and value != []}


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    if (file := checkpoint.folder / "tokenizer.json").is_file():
        shutil.copyfile(file, folder / file.name)


def _twice(skeleton: Skeleton, made: list[Stored]) -> list[str]:
    """A warning where one matrix of the model is two of the file."""
    tied = [skeleton.sources.get(f"{path}.weight", [("", None)])[0][0] for path in _ends(skeleton)]
    if len(tied) < 2 or len(set(tied)) > 1:
        return []
    (size,) = (matrix.bytes // 2 for matrix in made if matrix.source == tied[0])
    return [
        f"{tied[0]} is in the file twice, {byte_size(size)} each: ExecuTorch looks rows up in one copy, and XNNPACK "
        "multiplies by the other"
    ]


def _ends(skeleton: Skeleton) -> list[str]:
    """Paths of the embedding and of the output layer."""
    ends = skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings()
    return [path for path, module in skeleton.model.named_modules() if any(module is end for end in ends)]
