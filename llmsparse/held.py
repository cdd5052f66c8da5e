"""What a module with a packed weight holds: the tensors of docs/format.md as buffers of the same names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmsparse.ops import Stored
from llmsparse.packed import Packed


def hold(module: nn.Module, packed: Packed, dtype: torch.dtype) -> None:
    """Give ``module`` the buffers of ``packed`` in their final shapes, to be filled by a loader.

    ``dtype``: of the dense weight that it stands for.
    """
    module.packed = packed  # type: ignore[assignment]
    module.dtype = dtype  # type: ignore[assignment]
    for name, (dtype, shape) in packed.tensors().items():
        module.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
    module._stored = None  # type: ignore[assignment]


def ready(module: nn.Module, path: str) -> None:
    """After loading: check the tensors, and find where the rows start.

    Raises:
        UserError: a tensor is not what the format allows.
    """
    keep_scales(module)
    packed, tensors = _packed(module), _tensors(module)
    packed.check(path, dict(zip(packed.tensors(), tensors, strict=True)))
    starts = packed.starts(dict(zip(packed.tensors(), tensors, strict=True)))
    if starts is not None:
        module.register_buffer("starts", starts, persistent=False)
    module._stored = None  # type: ignore[assignment]


def moved(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """After ``fn`` moved or cast every tensor of ``module``."""
    module.dtype = fn(torch.empty(0, dtype=module.dtype)).dtype  # type: ignore[assignment, arg-type]
    keep_scales(module)


def keep_scales(module: nn.Module) -> None:
    """Scales are BF16 again, which no dtype of a model loses; addresses are forgotten."""
    if "scales" in module._buffers:
        module._buffers["scales"] = module._buffers["scales"].to(torch.bfloat16)  # type: ignore[union-attr]
    module._stored = None  # type: ignore[assignment]


def no_weight(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A shape and a dtype on the meta device, for code that asks a layer's weight for them; it has no values."""
    return torch.empty(shape, dtype=module.dtype, device="meta")  # type: ignore[arg-type]


def stored(module: nn.Module) -> Stored:
    """The weight of ``module`` as the operators take it."""
    if module._stored is None or torch.compiler.is_compiling():
        found = Stored(_packed(module), _tensors(module), module._buffers.get("starts"))
        if torch.compiler.is_compiling():
            return found
        module._stored = found  # type: ignore[assignment]
    return module._stored  # type: ignore[return-value]


def _packed(module: nn.Module) -> Packed:
    return module.packed  # type: ignore[return-value]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [getattr(module, name) for name in _packed(module).tensors()]
