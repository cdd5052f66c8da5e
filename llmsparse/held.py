"""What a module with a packed weight holds: the tensors of docs/format.md as buffers of the same names."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmsparse import gpu, ops
from llmsparse.ops import Stored
from llmsparse.packed import Packed

UNREAD = "a packed weight"  # in place of a name


def hold(module: Any, packed: Packed, dtype: torch.dtype) -> None:
    """Give ``module`` the buffers of ``packed`` in their final shapes, to be filled by a loader.

    ``dtype``: of the dense weight that it stands for.
    """
    module.packed = packed
    module.dtype = dtype
    module.key = packed.key
    module.parts = tuple(packed.tensors())  # names of the buffers that the operators take
    for name, (part, shape) in packed.tensors().items():
        module.register_buffer(name, torch.empty(shape, dtype=part, device="meta"))
    module._stored = None
    module.stays_dense = False
    module.path = UNREAD
    module.register_load_state_dict_post_hook(_loaded)


def _loaded(module: Any, incompatible: Any) -> None:
    """After ``load_state_dict``: other tensors are checked like those of a file."""
    if not getattr(module, module.parts[0]).is_meta:
        ready(module, module.path)


def stay_dense(module: Any, wins: bool) -> None:
    """Multiply by a dense copy of the weight from now on, or by the packed one."""
    module.stays_dense = wins
    module.key = (
        json.dumps({**json.loads(module.packed.key), "stays_dense": wins}) if wins else module.packed.key
    )
    module._stored = None


def ready(module: Any, path: str) -> None:
    """After loading: check the tensors, and find where the rows start.

    Raises:
        UserError: a tensor is not what the format allows.
    """
    module.path = path
    for name in module.packed.tensors():  # a file may hold a tensor at any byte
        buffer = module._buffers[name]
        if buffer.data_ptr() % buffer.element_size():
            module._buffers[name] = buffer.clone()
    keep_scales(module)
    tensors = {name: getattr(module, name) for name in module.packed.tensors()}
    module.packed.check(path, tensors)
    starts = module.packed.starts(tensors)
    if starts is not None:
        module.register_buffer("starts", starts, persistent=False)
        module.parts = (*tensors, "starts")
    module._stored = None


def is_ready(module: Any) -> bool:
    """Whether the tensors were loaded and checked."""
    return module.path != UNREAD and not module._buffers[module.parts[0]].is_meta


def keep_on_cpu(module: Any) -> None:
    """The packed tensors go to the CPU, where they are saved from: a GPU multiplies by a layout of its own."""
    for name in module.parts:
        module._buffers[name] = module._buffers[name].cpu()
    module._stored = None


def moved(module: Any, fn: Callable[[Tensor], Tensor]) -> None:
    """After ``fn`` moved or cast every tensor of ``module``."""
    module.dtype = fn(torch.empty(0, dtype=module.dtype)).dtype
    keep_scales(module)


def keep_scales(module: Any) -> None:
    """Scales are BF16 again, which no dtype of a model loses; addresses are forgotten."""
    if "scales" in module._buffers:
        module._buffers["scales"] = module._buffers["scales"].to(torch.bfloat16)
    module._stored = None


def no_weight(module: Any, shape: tuple[int, ...]) -> Tensor:
    """A shape and a dtype on the meta device, for code that asks a layer's weight for them; it has no values."""
    return torch.empty(shape, dtype=module.dtype, device="meta")


def linear(module: Any, x: Tensor) -> Tensor:
    """x (..., in) times the transposed weight of ``module``."""
    tensors = _tensors(module)
    if ops.through_operators(x, tensors):
        return torch.ops.llmsparse.packed_linear(x, tensors, module.key)
    return ops.linear(stored(module), x)


def gather(module: Any, ids: Tensor) -> Tensor:
    """The rows of the table of ``module`` that ``ids`` names."""
    if torch.compiler.is_compiling():
        return torch.ops.llmsparse.packed_gather(ids, _tensors(module), module.key, module.dtype)
    return ops.gather(stored(module), ids, module.dtype)


def multiplied(table: Any) -> None:
    """A table that is an output layer too: on a GPU its dense weight is made now, not while a graph is captured."""
    if gpu.here(table.get_buffer(table.parts[0]).device):
        stored(table).kept_dense(table.dtype)


def stored(module: Any) -> Stored:
    """The weight of ``module`` as kernels take it, made once for each place that it lies in."""
    if module._stored is None:
        module._stored = ops.stored_of(_tensors(module), module.key)  # the operators find the same
    return module._stored


def _tensors(module: Any) -> list[Tensor]:
    return [getattr(module, name) for name in module.parts]
