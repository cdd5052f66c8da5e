"""How one weight is stored: its entry in config.json, its tensors' shapes, and what they must satisfy."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llmsparse import plugins
from llmsparse.bits import panels
from llmsparse.errors import UserError
from llmsparse.values import Values

VERSION = 1
LARGEST = 1 << 31  # of a dimension, beyond which a config is refused


@dataclass(frozen=True)
class Packed:
    """One packed weight, (out, in) = ``shape``; ``nnz`` and ``size`` are -1 where its layout has none."""

    layout: str
    values: str
    shape: tuple[int, int]
    nnz: int = -1
    size: int = -1
    n: int = -1
    m: int = -1
    pattern: str | None = None
    tied: tuple[str, ...] = ()

    @classmethod
    def parse(cls, module: str, entry: Any) -> "Packed":
        """Read an entry of ``quantization_config.weights``, which may come from anywhere.

        Raises:
            UserError: a key is missing, of a wrong type, or says what cannot be.
        """
        if not isinstance(entry, Mapping):
            raise UserError(f"config.json: the entry of {module} is {entry!r}, not an object")
        layout, values = entry.get("layout"), entry.get("values")
        if layout not in plugins.names("formats"):
            known = ", ".join(plugins.names("formats"))
            raise UserError(f"config.json: {module} has layout {layout!r}; known: {known}")
        if not isinstance(values, str):
            raise UserError(f"config.json: {module} has values {values!r}; a name such as bf16 is needed")
        try:
            Values.parse(values)
        except UserError as error:
            raise UserError(f"config.json: {module}: {error}") from error
        tied = entry.get("tied", [])
        if not isinstance(tied, list) or not all(isinstance(name, str) for name in tied):
            raise UserError(f"config.json: {module} has tied {tied!r}; a list of module names is needed")
        counts = {key: _count(module, entry, key) for key in _format(layout).FIELDS}
        pattern = entry.get("pattern") if isinstance(entry.get("pattern"), str) else None
        packed = cls(layout, values, _shape(module, entry), **counts, pattern=pattern, tied=tuple(tied))
        if wrong := packed.format.wrong(packed):
            raise UserError(f"config.json: {module} {wrong}")
        return packed

    def entry(self) -> dict[str, Any]:
        """The entry for ``quantization_config.weights``."""
        known = {key: value for key, value in asdict(self).items() if value not in (-1, None, ())}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}

    @property
    def format(self) -> ModuleType:
        return _format(self.layout)

    @cached_property
    def kind(self) -> Values:
        return Values.parse(self.values)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name after the module's -> dtype and shape."""
        found = dict(self.format.tensors(self))
        if groups := self.kind.groups(self.shape[1]):
            found["scales"] = (torch.bfloat16, (self.shape[0], groups))
        return found

    @property
    def key(self) -> str:
        """All that unpacking needs to know, as text that ``parse`` reads: operators take no objects."""
        return json.dumps({**self.entry(), "pattern": None, "tied": []})

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.tensors().values())

    def check_shapes(self, module: str, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Refuse tensors that are missing, or of another dtype or shape than this entry says."""
        for name, (dtype, shape) in self.tensors().items():
            if name not in found:
                raise UserError(f"{module}.{name} is missing; the checkpoint is incomplete, get it again")
            if found[name] != (dtype, shape):
                (has, of), short = found[name], str(dtype).removeprefix("torch.")
                raise UserError(
                    f"{module}.{name} is {str(has).removeprefix('torch.')} {list(of)}; config.json asks for "
                    f"{short} {list(shape)}; the files do not belong together, get them again"
                )

    def check(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors that are not what docs/format.md allows.

        Raises:
            UserError: names the tensor and what is wrong with it.
        """
        self.check_shapes(module, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        wrong = self.format.check(self, tensors)
        if wrong is None and "scales" in tensors:
            scales = tensors["scales"]
            if not bool((scales.isfinite() & (scales.half().to(scales.dtype) == scales)).all()):
                wrong = "scales", "holds a number that is not finite, or that fp16 does not hold"
        if wrong is not None:
            name, reason = wrong
            raise UserError(f"{module}.{name} {reason}; the file is damaged, get it again")

    def starts(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Where each row's values begin, in layouts that do not fix it: int64 (out + 1,)."""
        return self.format.starts(self, tensors)

    def numbers(
        self, tensors: Mapping[str, Tensor], first: int, last: int, starts: Tensor | None = None
    ) -> Tensor:
        """The numbers of rows ``first`` to ``last`` - 1, zeros included: (rows, in)."""
        if starts is None:
            starts = self.starts(tensors)
        return self.format.unpack(self, tensors, first, last, starts)

    def weight(
        self,
        tensors: Mapping[str, Tensor],
        first: int,
        last: int,
        dtype: torch.dtype | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """The weights of rows ``first`` to ``last`` - 1: (rows, in)."""
        scales = tensors["scales"][first:last] if "scales" in tensors else None
        return self.kind.weight(self.numbers(tensors, first, last, starts), scales, dtype)

    def dense(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """The whole weight (out, in), unpacked a panel of rows at a time."""
        if starts is None:
            starts = self.starts(tensors)
        dtype = dtype or self.kind.float_dtype or torch.float32
        whole = torch.empty(self.shape, dtype=dtype, device=next(iter(tensors.values())).device)
        for first, last in panels(*self.shape):
            whole[first:last] = self.weight(tensors, first, last, dtype, starts)
        return whole


def smallest(numbers: Tensor, values: Values, layouts: Iterable[str] | None = None) -> Packed | None:
    """The layout that stores ``numbers`` (out, in) in the fewest bytes (of ``layouts``); None when a tensor is as small.

    Ties go to the first name, so a 2:4 weight is a bitmask.
    """
    shape = (numbers.shape[0], numbers.shape[1])
    found = []
    for layout in plugins.names("formats") if layouts is None else layouts:
        for fields in _format(layout).measure(numbers, values):
            found.append(Packed(layout, values.name, shape, **fields))
    best = min(found, key=lambda packed: packed.bytes, default=None)
    if best is not None and values.float_dtype is not None and best.bytes >= numbers.nbytes:
        return None
    return best


@lru_cache(maxsize=16)
def _format(layout: str) -> ModuleType:
    return plugins.load("formats", layout)


def _count(module: str, entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST**2:
        raise UserError(f"config.json: {module} has {key} {value!r}; a count is needed")
    return value


def _shape(module: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    shape = entry.get("shape")
    good = isinstance(shape, list) and len(shape) == 2
    if not good or not all(type(size) is int and 0 < size < LARGEST for size in shape or ()):
        raise UserError(f"config.json: {module} has shape {shape!r}; [out, in] is needed")
    assert isinstance(shape, list)
    return shape[0], shape[1]
