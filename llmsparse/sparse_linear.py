"""A linear layer whose weight stays packed."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmsparse import held, ops
from llmsparse.errors import UserError
from llmsparse.packed import Packed


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias with W (out, in) unpacked on the way; gradients flow to x and to the bias.

    ``transposed``: it stands for transformers' Conv1D, which stores (in, out).
    """

    packed: Packed

    def __init__(
        self, packed: Packed, dtype: torch.dtype, bias: nn.Parameter | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.transposed = transposed
        self.bias = bias
        held.hold(self, packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        found = held.linear(self, x)
        return found if self.bias is None else found + self.bias

    def unpack(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary layer with the same weights."""
        weight = held.stored(self).dense(dtype)
        layer: nn.Module
        if self.transposed:
            layer, weight = Conv1D(0, self.in_features), weight.T.contiguous()
            layer.nf = self.out_features
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(dtype))
        layer.register_parameter("bias", bias)
        return layer

    def requires_grad_(self, requires_grad: bool = True) -> "SparseLinear":
        if requires_grad:
            raise UserError(ops.NO_TRAINING)
        return super().requires_grad_(False)

    def extra_repr(self) -> str:
        p = self.packed
        return f"in_features={self.in_features}, out_features={self.out_features}, {p.layout}, {p.values}"

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        super()._apply(fn, recurse)
        held.moved(self, fn)
        return self

    @property
    def weight(self) -> Tensor:
        """A shape and a dtype, for code that asks for them; ``unpack`` gives values."""
        rows, columns = self.packed.shape
        return held.no_weight(self, (columns, rows) if self.transposed else (rows, columns))
