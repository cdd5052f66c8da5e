"""What tests of layouts share: numbers with zeros, and a reader of docs/format.md in numpy that shares no code."""

import numpy as np
import torch
from torch import Tensor

from llmsparse.packed import Packed
from llmsparse.values import Values

KINDS = ("bf16", "fp16", "fp32", "int8", "int4:32", "int4:5")
SHAPES = [(1, 1), (3, 5), (7, 16), (16, 33), (5, 64), (64, 128)]


def numbers(kind: str, shape: tuple[int, int], density: float = 0.5, seed: int = 0) -> Tensor:
    """Random stored numbers, with an empty row where there is more than one."""
    values, generator = Values.parse(kind), torch.Generator().manual_seed(seed)
    if values.float_dtype is not None:
        found = values.numbers(torch.randn(shape, generator=generator))
    else:
        most = 127 if values.bits == 8 else 7
        found = torch.randint(-most, most + 1, shape, generator=generator, dtype=torch.int8)
    kept = torch.rand(shape, generator=generator) < density
    kept[1:2] = False
    return found * kept


def scales(kind: str, shape: tuple[int, int], seed: int = 1) -> dict[str, Tensor]:
    groups = Values.parse(kind).groups(shape[1])
    if not groups:
        return {}
    drawn = torch.rand(shape[0], groups, generator=torch.Generator().manual_seed(seed))
    return {"scales": (drawn + 0.5).bfloat16()}


def pack(layout: str, kind: str, numbers: Tensor) -> tuple[Packed, dict[str, Tensor]]:
    """The smallest entry of ``layout`` for ``numbers``, and its tensors, scales included."""
    from llmsparse import plugins

    shape = (numbers.shape[0], numbers.shape[1])
    fields = plugins.load("formats", layout).measure(numbers, Values.parse(kind))
    packed = min((Packed(layout, kind, shape, **f) for f in fields), key=lambda p: p.bytes)
    return packed, {**packed.format.pack(packed, numbers), **scales(kind, shape)}


def read(entry: dict, tensors: dict[str, Tensor]) -> np.ndarray:
    """The weight (out, in) in float32 as docs/format.md says, written from it alone."""
    out, columns = entry["shape"]
    raw = {
        k: t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for k, t in tensors.items()
    }
    four = entry["values"].startswith("int4")
    weight = np.zeros((out, columns), np.float32)
    cursor = 0
    for row in range(out):
        if entry["layout"] == "bitmask":
            places = [c for c in range(columns) if raw["mask"][row, c // 8] >> (c % 8) & 1]
        elif entry["layout"] == "dense":
            places = list(range(columns))
        else:
            b = int(np.log2(entry["m"]))
            stream = int.from_bytes(raw["positions"][row].tobytes(), "little")
            count = columns // entry["m"] * entry["n"]
            places = [
                k // entry["n"] * entry["m"] + (stream >> (k * b) & (entry["m"] - 1)) for k in range(count)
            ]
        if entry["layout"] == "dense":
            stored = raw["codes"][row]
        else:
            width = (len(places) + 1) // 2 if four else len(places)
            stored = raw["values"][cursor : cursor + width]
            cursor += width
        weight[row, places] = _numbers(entry["values"], stored, len(places))
    if "scales" in raw:
        each = (raw["scales"].astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
        group = int(entry["values"].split(":")[1]) if four else columns
        weight = weight * np.repeat(each, group, axis=1)[:, :columns] + np.float32(0)
    return weight


def _numbers(kind: str, stored: np.ndarray, count: int) -> np.ndarray:
    if kind == "bf16":
        return (stored.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "fp16":
        return stored.view(np.float16).astype(np.float32)
    if kind == "fp32":
        return stored.view(np.float32)
    if kind == "int8":
        return stored.astype(np.float32)
    halves = [nibble for byte in stored for nibble in (int(byte) & 15, int(byte) >> 4)]
    return np.array(halves[:count], np.float32) - 8
