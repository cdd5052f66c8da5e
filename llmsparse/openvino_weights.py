"""Weights in an OpenVINO graph: constants of codes or floats that are multiplied out where they are used."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.values import Values

SCALES = ".scales"  # after the name of the codes
SMALLEST = 8  # inputs a scale, at least


def group_of(kind: Values, inputs: int) -> int:
    """Inputs a scale in the file: a group that does not divide a row is cut into equal ones that do; 0: none can."""
    group = inputs if kind.group is None else min(kind.group, inputs)
    group = math.gcd(group, inputs)
    return group if kind.group is None or group >= SMALLEST else 0


def stored_bytes(kind: Values, shape: tuple[int, ...]) -> int:
    """What a weight (out, in) takes in the file, its scales included."""
    outputs, inputs = shape
    scales = 0 if kind.float_dtype else 2 * outputs * (inputs // group_of(kind, inputs))
    return outputs * inputs * kind.bits // 8 + scales


def of_codes(name: str, kind: Values, codes: Tensor, scales: Tensor) -> Any:
    """The node that computes codes (out, in) times scales (out, groups) in float32, which the CPU plugin never does:
    it recognises the nodes, and multiplies by the codes themselves.

    Raises:
        UserError: a scale that fp16 does not hold.
    """
    from openvino import Type, op
    from openvino import opset13 as ops

    outputs, inputs = codes.shape
    group = group_of(kind, inputs)
    each = scales if kind.group is None else scales.repeat_interleave(min(kind.group, inputs) // group, 1)
    each = each[:, : inputs // group].float()  # (out, groups of the file)
    if not torch.equal(each.half().float(), each):
        raise UserError(f"{name} has a scale that fp16 does not hold; quantise the model again")
    whole = group == inputs
    shape = [outputs, inputs] if whole else [outputs, inputs // group, group]
    stored = op.Constant(_tensor(Type.i8 if kind.bits == 8 else Type.i4, shape, _packed(kind, codes)))
    stored.set_friendly_name(name)
    factors = each.half().numpy()
    factor = ops.constant(factors if whole else factors[:, :, None])
    factor.set_friendly_name(name + SCALES)
    values = ops.multiply(ops.convert(stored, "f32"), ops.convert(factor, "f32"))
    return values if whole else ops.reshape(values, np.array([outputs, inputs], np.int64), special_zero=False)


def of_floats(name: str, kind: Values, weight: Tensor) -> Any:
    """The node that gives a weight (out, in), stored in 16 or 32 bits, in float32.

    Raises:
        UserError: numbers that the kind does not hold.
    """
    from openvino import Type, op
    from openvino import opset13 as ops

    made = weight.to(kind.float_dtype)
    if not bool(made.isfinite().all()):
        if bool(weight.isfinite().all()):
            raise UserError(f"{name} is beyond {kind.name}'s range; use --values bf16")
        raise UserError(f"{name} holds values that are not finite; repair the model")
    types = {"fp16": Type.f16, "bf16": Type.bf16, "fp32": Type.f32}
    raw = made.contiguous().view(kind.dtype).numpy()
    stored = op.Constant(_tensor(types[kind.name], list(weight.shape), raw))
    stored.set_friendly_name(name)
    return stored if kind.name == "fp32" else ops.convert(stored, "f32")


def _tensor(type: Any, shape: list[int], raw: np.ndarray) -> Any:
    """A tensor of OpenVINO's own memory with these bytes."""
    from openvino import Shape, Tensor

    made = Tensor(type, Shape(shape))
    made.data.reshape(-1).view(np.uint8)[:] = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return made


def _packed(kind: Values, codes: Tensor) -> np.ndarray:
    """Codes as bytes; of int4 two in each, the first lowest."""
    flat = codes.contiguous().view(-1).numpy()
    if kind.bits == 8:
        return flat
    return (flat[0::2] & 15) | (flat[1::2] << 4)


def put(graph: Any, name: str, node: Any) -> None:
    """Let what reads the constant ``name`` read ``node``.

    Raises:
        UserError: the graph has no such constant.
    """
    for found in graph.get_ops():
        if found.get_type_name() == "Constant" and found.get_friendly_name() == name:
            for reader in found.output(0).get_target_inputs():
                reader.replace_source_output(node.output(0))
            return
    raise UserError(f"OpenVINO's trace of the model has no constant {name}; use --format packed")


def read(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of ``of_codes`` and ``of_floats`` in a written model, float32 (out, in), by name."""
    from openvino import Core

    graph = Core().read_model(file)
    found = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Constant"}
    for name, node in found.items():
        if not name.endswith(".weight"):
            continue
        if name + SCALES not in found:
            yield name, _floats(node)
            continue
        factors = torch.from_numpy(found[name + SCALES].data.astype(np.float32))
        values = _codes(node).view(*factors.shape[:-1], -1) * factors
        yield name, values.flatten(1)


def _floats(node: Any) -> Tensor:
    """Of a constant of any float type; bf16 is the upper half of float32."""
    if node.get_element_type().get_type_name() == "bf16":
        upper = node.data.reshape(-1).view(np.uint16).astype(np.uint32) << 16
        return torch.from_numpy(upper.view(np.float32).reshape(node.shape))
    return torch.from_numpy(node.data.astype(np.float32))


def _codes(node: Any) -> Tensor:
    """Flat, float32."""
    raw = node.data.reshape(-1).view(np.int8)
    if node.get_element_type().get_type_name() == "i8":
        return torch.from_numpy(raw.astype(np.float32))
    both = np.stack([(raw << 4).astype(np.int8) >> 4, raw >> 4], axis=1)
    return torch.from_numpy(both.reshape(-1).astype(np.float32))
