"""A folder for OpenVINO: a stateful model in its own format, with codes that its CPU plugin multiplies as they are."""

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from llmsparse import export_report, openvino_weights
from llmsparse.atomic import whole_folder
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.openvino_weights import SMALLEST, group_of, stored_bytes
from llmsparse.packing import Candidate, Numbers
from llmsparse.runs import OWN
from llmsparse.skeleton import Skeleton
from llmsparse.values import Values
from llmsparse.writer import INDEXES, WEIGHTS, disk_errors

EXTRA = Extra("openvino", {"openvino": "2026.4"})
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ROTARY = ("default", "linear", "llama3", "yarn")  # the others depend on how long the text has become
NAME = "openvino_model.xml"  # its weights lie in the .bin beside it, as optimum-intel calls them


class Matrix(NamedTuple):
    """A weight of the model and how it is stored."""

    candidate: Candidate
    kind: Values
    shape: tuple[int, ...]

    @property
    def coded(self) -> bool:
        return self.kind.float_dtype is None

    @property
    def recut(self) -> bool:
        """Whether its scales are repeated for groups that divide its rows."""
        group = self.kind.group
        return self.coded and group is not None and self.shape[1] % min(group, self.shape[1]) != 0


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Refuse what cannot be written, trace the model once in float32, put the stored weights in their places.

    Raises:
        UserError: an architecture or rotary embeddings that a trace does not hold, rows that no group divides.
    """
    begun = time.perf_counter()
    _check_family(checkpoint.config(trust_remote_code))
    numbers = Numbers(checkpoint, values, embeddings)
    matrices = plan(Skeleton(checkpoint, trust_remote_code=trust_remote_code), numbers)
    with disk_errors(out), whole_folder(out.expanduser().absolute()) as work:
        _write(work / NAME, numbers, matrices, trust_remote_code, progress)
        _copy_others(checkpoint.folder, work)
        stored = [
            Stored(m.candidate.source, m.kind.name, stored_bytes(m.kind, m.shape), m.candidate.table or m.candidate.head)
            for m in matrices
        ]  # fmt: skip
        result = {
            "format": "openvino",
            "file": NAME,
            **sizes(checkpoint, stored),
            "values": numbers.describe(),
            "warnings": [*_recut(matrices), *numbers.warnings],
        }
        result["bytes"]["after"] = sum(file.stat().st_size for file in weight_files(work))
        result["seconds"] = round(time.perf_counter() - begun, 2)
        export_report.write(work, result)
    return result


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What OpenVINO makes of the files: see ``llmsparse.openvino_check``."""
    from llmsparse.openvino_check import check

    return check(checkpoint, out / result["file"], weight_files(out), result, **options)


def weight_files(folder: Path) -> list[Path]:
    """The model: its graph and its constants."""
    return [folder / NAME, (folder / NAME).with_suffix(".bin")]


def _check_family(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{config.model_type} cannot be exported to OpenVINO here; known: {', '.join(FAMILIES)}. "
            "optimum-intel exports more, and rounds again"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    for kind in (each.get("rope_type", "default") for each in kinds):
        if kind not in ROTARY:
            raise UserError(
                f"rotary embeddings of type {kind} cannot be exported to OpenVINO: they change with the length of the "
                f"text, and its graph is traced once; known: {', '.join(ROTARY)}"
            )


def plan(skeleton: Skeleton, numbers: Numbers) -> list[Matrix]:
    """Every matrix and its kind, before a weight is read. UserError: rows that no group of 8 inputs or more divides."""
    floats = numbers.values
    if floats is None or floats.float_dtype is None:
        floats = Values.parse("fp16")
    found = []
    for candidate in _candidates(skeleton):
        matrix = Matrix(
            candidate, numbers.coded(candidate) or floats, skeleton.checkpoint.shape(candidate.source)
        )
        if matrix.coded and not group_of(matrix.kind, matrix.shape[1]):
            raise UserError(
                f"{candidate.source} has rows of {matrix.shape[1]} inputs, which no group of {SMALLEST} or more that "
                f"divides {matrix.kind.name}'s does, and OpenVINO's groups are all of one size; use int8"
            )
        found.append(matrix)
    return found


def _candidates(skeleton: Skeleton) -> list[Candidate]:
    """The tables, then the linear layers of the blocks; an output layer that is tied is the embedding."""
    found = []
    for path in skeleton.tables:
        source = skeleton.sources[f"{path}.weight"][0][0]
        table = isinstance(skeleton.model.get_submodule(path), nn.Embedding)
        if table or not skeleton.same_as(source):
            found.append(Candidate(path, source, table=table, head=not table))
    linear = [weight for weight in skeleton.weights if weight.block is not None]
    return [*found, *(Candidate(w.parameter.removesuffix(".weight"), w.source) for w in linear)]


def _write(
    file: Path, numbers: Numbers, matrices: list[Matrix], trust_remote_code: bool, progress: Any
) -> None:
    from openvino import save_model

    from llmsparse.openvino_graph import stateful

    progress.start("writing", len(matrices) + 1)
    model = load_model(numbers.checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
    graph = stateful(model)
    progress.advance("writing", "graph")
    for candidate, kind, _ in matrices:
        if kind.float_dtype is None:
            drawn = numbers.of(candidate)
            assert drawn is not None and drawn[2] is not None
            node = openvino_weights.of_codes(candidate.source, drawn[0], drawn[1], drawn[2])
        else:
            tensor = numbers.checkpoint.tensor(candidate.source)
            node = openvino_weights.of_floats(candidate.source, kind, tensor)
        openvino_weights.put(graph, f"{candidate.path}.weight", node)
        numbers.checkpoint.close()
        progress.advance("writing", candidate.path)
    save_model(graph, file, compress_to_fp16=False)


def _copy_others(source: Path, work: Path) -> None:
    """Configuration and tokenizer, for what reads them beside the model."""
    for file in source.iterdir():
        left = file.suffix in WEIGHTS or file.name in INDEXES or file.name.startswith(".")
        if file.is_file() and not left and not OWN.fullmatch(file.name):
            shutil.copyfile(file, work / file.name)


def _recut(matrices: list[Matrix]) -> list[str]:
    cut = [matrix for matrix in matrices if matrix.recut]
    if not cut:
        return []
    first = cut[0]
    return [
        f"{len(cut)} matrices have their scales repeated for smaller groups: {first.kind.name}'s does not divide their "
        f"rows; the first is {first.candidate.source} with {first.shape[1]} inputs in groups of "
        f"{group_of(first.kind, first.shape[1])}; codes and scales stay what they were"
    ]
