"""The operators of packed weights, a product and a gather: torch everywhere, a native kernel where there is one."""

import json
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from llmsparse import bits, gpu, native
from llmsparse.errors import UserError
from llmsparse.kernels.cpu import library
from llmsparse.packed import Packed

NO_TRAINING = (
    "packed weights cannot be trained: they are bits and codes, which have no gradient; "
    "train the dense model that model.dequantize() gives, then prune and export it again"
)


class SlowProduct(UserWarning):
    """Packed weights are unpacked for every product."""


class Stored:
    """One packed weight in memory: its tensors in the format's order, then where its rows start, if that varies.

    ``stays_dense``: torch's dense product is faster here, and a dense copy is kept.
    """

    def __init__(self, packed: Packed, tensors: Sequence[Tensor], stays_dense: bool = False) -> None:
        names = packed.tensors()
        self.packed, self.given = packed, tuple(tensors)
        self.tensors = dict(zip(names, tensors, strict=False))
        self.starts = tensors[len(names)] if len(tensors) > len(names) else None
        self.stays_dense, self.key = stays_dense, packed.key
        self._dense: Tensor | None = None

    def __reduce__(self) -> Any:
        """A copied or pickled model makes its own anew: addresses are in this one."""
        return type(None), ()

    def weight(self, first: int, last: int, dtype: torch.dtype | None = None) -> Tensor:
        """The weights of rows ``first`` to ``last`` - 1: (rows, in)."""
        return self.packed.weight(self.tensors, first, last, dtype, self.starts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight (out, in)."""
        return self.packed.dense(self.tensors, dtype, self.starts)

    @cached_property
    def kernel(self) -> library.Matrix:
        """The native kernels' view of this weight."""
        return native.matrix(self)

    @cached_property
    def product(self) -> Callable[[Tensor], Tensor]:
        """The native kernels' product with this weight, made once."""
        return native.product(self)

    def kept_dense(self, dtype: torch.dtype, keep: bool = True) -> Tensor:
        """The whole weight (out, in), remembered from now on if ``keep``."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        dense = self.dense(dtype)
        if keep:
            self._dense = dense
        return dense


def through_operators(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether ``torch.compile`` or autograd must see the operators; else a direct call spares the dispatcher's time.

    Raises:
        UserError: a packed tensor is to be trained.
    """
    if torch.compiler.is_compiling():
        return True
    if not torch.is_grad_enabled():
        return False
    if any(tensor.requires_grad for tensor in tensors):
        raise UserError(NO_TRAINING)
    return x.requires_grad


def on_gpu(module: Any, x: Tensor) -> Tensor:
    """x (..., in) times the transposed weight of a module with a ``layer`` on a GPU: (..., out)."""
    if through_operators(x, module.gpu_tensors):
        return torch.ops.llmsparse.packed_linear(x, module.gpu_tensors, module.gpu_key)
    return module.layer.linear(x)


def linear(stored: "Stored | gpu.Layer", x: Tensor, keep: bool = True) -> Tensor:
    """x (..., in) times the transposed weight: (..., out); no gradients.

    ``keep``: what is unpacked here may outlive the call, which the memory of a CUDA graph does not.
    """
    if isinstance(stored, gpu.Layer):
        return stored.linear(x)
    if stored.stays_dense or gpu.here(x.device):  # there an output layer, whose table is looked up in as well
        return torch.nn.functional.linear(x, stored.kept_dense(x.dtype, keep))
    if (reason := native.why_not(x)) is None:
        return stored.product(x)
    _warn_once(reason)
    return linear_reference(stored, x)


def linear_reference(stored: Stored, x: Tensor) -> Tensor:
    """Unpacked a panel of rows at a time, so that the dense weight never exists."""
    out, columns = stored.packed.shape
    found = x.new_empty(*x.shape[:-1], out)
    for first, last in bits.panels(out, columns):
        found[..., first:last] = torch.nn.functional.linear(x, stored.weight(first, last, x.dtype))
    return found


def gather(stored: Stored, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table by number: ids (...) -> (..., width)."""
    if native.why_not(torch.empty(0, dtype=dtype, device=ids.device)) is None:
        return native.gather(stored.kernel, ids, dtype)
    flat = ids.reshape(-1)
    rows = {name: tensor[flat] for name, tensor in stored.tensors.items()}
    numbers = stored.packed.format.rows(stored.packed, rows["codes"])
    weight = stored.packed.kind.weight(numbers, rows["scales"], dtype)
    return weight.view(*ids.shape, stored.packed.shape[1])


@torch.library.custom_op("llmsparse::packed_linear", mutates_args=())
def packed_linear(x: Tensor, tensors: Sequence[Tensor], key: str) -> Tensor:
    """``linear`` for ``torch.compile``, ``torch.export`` and autograd."""
    return linear(stored_of(tensors, key), x, keep=not gpu.here(x.device))


@packed_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], key: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _packed(key).shape[0])


@torch.library.custom_op("llmsparse::packed_linear_input_gradient", mutates_args=())
def packed_linear_input_gradient(gradient: Tensor, tensors: Sequence[Tensor], key: str) -> Tensor:
    """The gradient with respect to x: gradient (..., out) times the weight, in panels of rows."""
    stored = stored_of(tensors, key)
    if isinstance(stored, gpu.Layer):
        return stored.input_gradient(gradient)
    out, columns = stored.packed.shape
    exact = torch.promote_types(gradient.dtype, torch.float32)
    found = torch.zeros(*gradient.shape[:-1], columns, dtype=exact, device=gradient.device)
    for first, last in bits.panels(out, columns):
        found += gradient[..., first:last] @ stored.weight(first, last, gradient.dtype)
    return found.to(gradient.dtype)


@packed_linear_input_gradient.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], key: str) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], _packed(key).shape[1])


def _keep(ctx, inputs, output) -> None:
    _, tensors, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient: Tensor):
    found = torch.ops.llmsparse.packed_linear_input_gradient(gradient, list(ctx.saved_tensors), ctx.key)
    return found, [None] * len(ctx.saved_tensors), None


packed_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("llmsparse::packed_gather", mutates_args=())
def packed_gather(ids: Tensor, tensors: Sequence[Tensor], key: str, dtype: torch.dtype) -> Tensor:
    """``gather`` for ``torch.compile`` and ``torch.export``."""
    stored = stored_of(tensors, key)
    assert isinstance(stored, Stored)  # tables have no layer
    return gather(stored, ids, dtype)


@packed_gather.register_fake
def _(ids: Tensor, tensors: Sequence[Tensor], key: str, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, _packed(key).shape[1], dtype=dtype)


@lru_cache(maxsize=4096)
def _packed(key: str) -> Packed:
    return Packed.parse("a packed weight", json.loads(key))


def stored_of(tensors: Sequence[Tensor], key: str) -> Stored | gpu.Layer:
    """Made once for the same tensors, and kept by the first of them: a kernel's view of a weight counts its bits."""
    if '"gpu"' in key:
        return gpu.Layer.parse(key, tensors)
    found = getattr(tensors[0], "_llmsparse_stored", None)
    if (
        found is None
        or found.key != key
        or any(a is not b for a, b in zip(found.given, tensors, strict=True))
    ):
        found = Stored(_packed(key), tensors, bool(json.loads(key).get("stays_dense")))
        found.key = key
        tensors[0]._llmsparse_stored = found  # type: ignore[attr-defined]
    return found


@lru_cache(maxsize=1)
def _warned() -> set[str]:
    return set()


def _warn_once(reason: str) -> None:
    if reason not in _warned():
        _warned().add(reason)
        warnings.warn(f"packed weights are unpacked for every product: {reason}", SlowProduct, stacklevel=3)
