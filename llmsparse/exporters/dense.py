"""An ordinary checkpoint with every weight in full, for tools that read nothing else; a packed folder becomes one too."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse import gridfile, pieces
from llmsparse.checkpoint import DTYPE_NAMES, Checkpoint
from llmsparse.errors import UserError
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.grid import Grid
from llmsparse.gridfile import GridFile
from llmsparse.heap import return_freed_memory
from llmsparse.inspect import packed_weights
from llmsparse.skeleton import Skeleton, Weight
from llmsparse.values import Values
from llmsparse.writer import Writer

EXTRA = Extra()
PACKED = True  # takes packed folders
GAIN = "transformers gains no speed and no memory from zeros in full tensors"


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write tensor by tensor; codes, packed or beside the model, lie beside the output as `prune` wrote them.

    Raises:
        UserError: values that are codes, or weights beyond the range of the dtype asked for.
    """
    begun = time.perf_counter()
    source = Source(checkpoint, _dtype(values, embeddings), trust_remote_code)
    writer = Writer(source.target, out, overwrite, gridfile.beside(source.coded))
    pieces.clear(writer)
    result = source.result()
    names = source.target.names()
    progress.start("writing", len(names))
    with pieces.filling(checkpoint, writer, result, source.changes):
        for name in names:
            writer.write(source.tensors(name))
            checkpoint.close()
            return_freed_memory()
            progress.advance("writing", name)
        result["seconds"] = round(time.perf_counter() - begun, 2)
    return result


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What transformers makes of the files: see ``llmsparse.transformers_check``."""
    from llmsparse.transformers_check import check

    return check(checkpoint, out, result, GAIN, **options)


def _dtype(values: str | None, embeddings: str | None) -> torch.dtype | None:
    kind = None if values is None else Values.parse(values)
    if kind is not None and kind.float_dtype is None or embeddings not in (None, "keep"):
        asked = (
            f"--values {values}"
            if kind is not None and kind.float_dtype is None
            else f"--embeddings {embeddings}"
        )
        raise UserError(
            f"{asked} was asked for; --format dense stores floats (bf16, fp16, fp32); for codes beside them use "
            "`llmsparse quantize`"
        )
    return None if kind is None else kind.float_dtype


class Source:
    """The tensors of a checkpoint, packed or not, as the output has them."""

    def __init__(self, checkpoint: Checkpoint, asked: torch.dtype | None, trust_remote_code: bool) -> None:
        self.checkpoint = checkpoint
        self.packed = packed_weights(checkpoint) if checkpoint.is_packed else {}
        self.weights = {
            f"{stem}.weight": stem for stem in self.packed
        }  # disk name -> stem of its packed tensors
        self.codes = GridFile.open(checkpoint.folder)
        self.asked, self.stored = asked, checkpoint.stored_dtype
        self.target = Checkpoint(checkpoint.folder, self._headers())
        skeleton = Skeleton(self.target, trust_remote_code=trust_remote_code)
        self.tables = {skeleton.sources[f"{path}.weight"][0][0] for path in skeleton.tables}
        self.parts: dict[str, list[Weight]] = {}  # disk name -> the weights in it
        for weight in skeleton.weights:
            self.parts.setdefault(weight.source, []).append(weight)
        for name in self.weights:
            if self._transposed(name):
                self.target.headers[self.target.location[name]][name]["shape"].reverse()

    @property
    def changes(self) -> dict[str, Any]:
        """Of config.json."""
        plain: dict[str, Any] = {"quantization_config": None}
        if self.asked is not None:
            plain |= {"dtype": str(self.asked).removeprefix("torch."), "torch_dtype": None}
        return plain

    @property
    def coded(self) -> dict[str, tuple[tuple[int, int], Grid]]:
        """Of each weight with codes: (out, in) and grid."""
        if self.codes is not None:
            return {n: (self.codes.shape(n), self.codes.grid(n)) for n in self.codes.names}
        kinds = {name: self.packed[stem] for name, stem in self.weights.items()}
        return {n: (p.shape, Grid.parse(p.values)) for n, p in kinds.items() if p.kind.float_dtype is None}

    def _headers(self) -> dict[str, dict[str, Any]]:
        """File -> tensors: a packed weight's lies where its first part lay."""
        parts = {f"{stem}.{part}": stem for stem, packed in self.packed.items() for part in packed.tensors()}
        headers: dict[str, dict[str, Any]] = {}
        for name in self.checkpoint.names():
            file = headers.setdefault(self.checkpoint.location[name], {})
            if (stem := parts.get(name)) is None:
                dtype, shape = self._of(self.checkpoint.dtype(name)), self.checkpoint.shape(name)
                file[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape)}
            elif not any(f"{stem}.weight" in tensors for tensors in headers.values()):
                packed = self.packed[stem]
                dtype = self._of(packed.kind.float_dtype or self.stored)
                file[f"{stem}.weight"] = {"dtype": DTYPE_NAMES[dtype], "shape": list(packed.shape)}
        return headers

    def _of(self, dtype: torch.dtype) -> torch.dtype:
        """What a tensor of ``dtype`` becomes."""
        return self.asked if self.asked is not None and dtype.is_floating_point else dtype

    def _transposed(self, name: str) -> bool:
        return any(weight.transposed for weight in self.parts.get(name, ()))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is written of ``name``: itself, and the codes and scales of the weights in it."""
        made = self._unpacked(name) if name in self.weights else self._ordinary(name)
        if not bool(made[name].isfinite().all()) and self.asked == torch.float16:
            raise UserError(f"{name} is beyond fp16's range, or not finite; use --values bf16")
        return made

    def _unpacked(self, name: str) -> dict[str, Tensor]:
        stem = self.weights[name]
        packed = self.packed[stem]
        tensors = {part: self.checkpoint.tensor(f"{stem}.{part}") for part in packed.tensors()}
        packed.check(stem, tensors)
        weight = packed.dense(tensors, self.target.dtype(name))
        made = {name: weight.T.contiguous() if self._transposed(name) else weight}
        if packed.kind.float_dtype is None:
            made |= gridfile.tensors(name, packed.numbers(tensors, 0, packed.shape[0]), tensors["scales"])
        return made

    def _ordinary(self, name: str) -> dict[str, Tensor]:
        stored = self.checkpoint.tensor(name)
        made = {name: stored.to(self.target.dtype(name), copy=True)}
        for key, view in self._coded_in(name):
            assert self.codes is not None
            values = self.codes.checked(key, view(stored))
            view(made[name]).copy_(values)
            made |= gridfile.tensors(key, self.codes.codes(key), self.codes.scales(key))
        return made

    def _coded_in(self, name: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Weights of the tensor ``name`` that have codes beside the model: their names, and views (out, in) into it."""
        known = set(self.codes.names) if self.codes is not None else set()
        found = {weight.name: weight.stored for weight in self.parts.get(name, ())}
        return [(key, view) for key, view in (found or {name: lambda tensor: tensor}).items() if key in known]

    def result(self) -> dict[str, Any]:
        matrices = dict.fromkeys([*self.parts, *sorted(self.tables)])
        stored = [self._stored(name) for name in matrices]
        result = {"format": "dense", **sizes(self.target, stored), "warnings": [], "seconds": 0.0}
        for key, table in (("linear", False), ("embeddings", True)):
            result[key]["before"] = sum(self._before(each.source) for each in stored if each.table is table)
        result["values"] = {"from": "the weights as they are", "kinds": sorted(result["layouts"])}
        result["bytes"]["before"] = sum(file.stat().st_size for file in self.checkpoint.files)
        return result

    def _stored(self, name: str) -> Stored:
        kind = Values.of(self.target.dtype(name))
        layout = kind.name if kind else str(self.target.dtype(name)).removeprefix("torch.")
        return Stored(name, layout, self.target.bytes(name), name in self.tables)

    def _before(self, name: str) -> int:
        return self.packed[self.weights[name]].bytes if name in self.weights else self.checkpoint.bytes(name)
