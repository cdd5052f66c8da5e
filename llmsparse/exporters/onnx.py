"""A folder for onnxruntime-genai: its builder's graph for CPUs, our codes in MatMulNBits."""

import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llmsparse import export_report, onnx_blocks, onnx_build, onnx_file, onnx_layout
from llmsparse.atomic import whole_folder
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.onnx_file import Coded
from llmsparse.onnx_layout import Piece
from llmsparse.packing import Candidate, Numbers, candidates
from llmsparse.skeleton import Skeleton
from llmsparse.values import Values
from llmsparse.writer import disk_errors

EXTRA = Extra("onnx", {"onnx": "1.18", "onnx-ir": "1.1", "onnxruntime": "1.31", "onnxruntime-genai": "0.18"})
GAIN = "onnxruntime gains no speed and no memory from zeros: it stores and multiplies every weight"


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Refuse what cannot be written, build the float graph, then write it anew with codes in the place of weights."""
    begun = time.perf_counter()
    if values in ("fp16", "bf16"):
        raise UserError(
            f"--values {values} was asked for; onnxruntime multiplies in fp32 on CPUs: use fp32, int8 or int4:32"
        )
    config = checkpoint.config(trust_remote_code)
    onnx_layout.check(config)
    skeleton = Skeleton(checkpoint, trust_remote_code=trust_remote_code)
    _refuse_mistaken(skeleton)
    numbers, found = Numbers(checkpoint, values, embeddings), candidates(skeleton)
    weights = _Weights(numbers, found.packable)
    out = out.expanduser().absolute()
    with disk_errors(out), whole_folder(out) as work:
        meanwhile = work / "build"
        progress.start("onnxruntime-genai's model builder", 1)
        onnx_build.build(checkpoint, meanwhile / "out", meanwhile)
        progress.advance("onnxruntime-genai's model builder", "")
        onnx_file.write(meanwhile / "out", work, config, weights.draw, progress)
        weights.check_drawn()
        for file in (meanwhile / "out").iterdir():
            if not (work / file.name).exists():
                shutil.move(file, work)
        shutil.rmtree(meanwhile)
        result = {
            "format": "onnx",
            **sizes(checkpoint, map(weights.stored, found.packable)),
            "values": numbers.describe(),
            "warnings": [*found.warnings, *numbers.warnings, *_float(weights), GAIN],
            "accuracy_level": onnx_file.ACCURACY if any(weights.kinds.values()) else None,
        }
        result["bytes"]["after"] = sum(file.stat().st_size for file in work.iterdir())
        result["seconds"] = round(time.perf_counter() - begun, 2)
        export_report.write(work, result)
    return result


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What the folder is worth: see ``llmsparse.onnx_check``."""
    from llmsparse.onnx_check import check

    return check(checkpoint, out, result, GAIN, **options)


def _refuse_mistaken(skeleton: Skeleton) -> None:
    """Refuse a layer that the builder takes for the output layer: it knows that one by its rows."""
    tokens = skeleton.config.vocab_size
    found = next((w for w in skeleton.weights if w.block is not None and w.out_features == tokens), None)
    if found is not None:
        raise UserError(
            f"{found.source} has {tokens} rows, as many as there are tokens: onnxruntime-genai's model builder takes it "
            "for the output layer; the model cannot be exported to ONNX"
        )


def _float(weights: "_Weights") -> list[str]:
    if any(weights.kinds.values()) or weights.numbers.values is not None:
        return []
    return [
        "without codes weights are stored as fp32, in which onnxruntime multiplies on CPUs; --values int8 is smaller"
    ]


class _Weights:
    """What each weight is stored as."""

    def __init__(self, numbers: Numbers, packable: list[Candidate]) -> None:
        self.numbers = numbers
        self.places = {path: each for each in packable for path in (each.path, *each.tied)}
        self.kinds = {each.source: numbers.coded(each) for each in packable}
        self.blocks = {
            each.source: onnx_blocks.block_of(kind, self._shape(each)[1], each.source)
            for each in packable
            if (kind := self.kinds[each.source]) is not None
        }
        self.left = set(self.places)
        self._coded = lru_cache(maxsize=2)(self._drawn)  # of a matrix in pieces, and of a table that is tied

    def draw(self, piece: Piece, built: np.ndarray) -> Coded | None:
        """The codes of these rows of a weight that the builder has as ``built`` (out, in); None: it stays float."""
        place = self.places.get(piece.path)
        if place is None:
            return None
        stored = self.numbers.checkpoint.tensor(place.source)[piece.rows].float().numpy()
        self.numbers.checkpoint.close()
        if not np.array_equal(stored, built):
            raise UserError(
                f"onnxruntime-genai's model builder did not put {place.source} where it belongs, or changed it"
            )
        self.left.discard(piece.path)
        if self.kinds[place.source] is None:
            return None
        whole = self._coded(place)
        return whole._replace(packed=whole.packed[piece.rows], scales=whole.scales[piece.rows])

    def check_drawn(self) -> None:
        """UserError where a weight met no node."""
        if self.left:
            raise UserError(f"onnxruntime-genai's model builder has no node for {min(self.left)}")

    def _drawn(self, place: Candidate) -> Coded:
        drawn = self.numbers.of(place)
        assert drawn is not None and drawn[2] is not None
        kind, codes, scales = drawn[0], drawn[1], drawn[2]
        block, inputs = self.blocks[place.source], codes.shape[1]
        packed, each = onnx_blocks.pack(kind, codes, block), onnx_blocks.spread(kind, scales, block, inputs)
        return Coded(place.source, kind, block, packed, each, inputs)

    def stored(self, place: Candidate) -> Stored:
        kind, (rows, inputs) = self.kinds[place.source], self._shape(place)
        table = place.table or place.head
        if kind is None:
            return Stored(place.source, "F32", 4 * rows * inputs, table)
        block = self.blocks[place.source]
        size = rows * onnx_blocks.row_bytes(kind, block, inputs)
        return Stored(place.source, f"{_name(kind)}:{block}", size, table)

    def _shape(self, place: Candidate) -> tuple[int, int]:
        rows, inputs = self.numbers.checkpoint.shape(place.source)
        return rows, inputs


def _name(kind: Values) -> str:
    return kind.name.partition(":")[0]
