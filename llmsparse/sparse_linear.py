"""A linear layer whose weight stays packed."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmsparse import gpu, held, ops
from llmsparse.errors import UserError
from llmsparse.packed import Packed


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias with W (out, in) unpacked on the way; gradients flow to x and to the bias.

    ``transposed``: it stands for transformers' Conv1D, which stores (in, out).
    """

    packed: Packed
    dtype: torch.dtype
    parts: tuple[str, ...]
    path: str

    def __init__(
        self, packed: Packed, dtype: torch.dtype, bias: nn.Parameter | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.transposed = transposed
        self.bias = bias
        held.hold(self, packed, dtype)
        # where it multiplies; the packed tensors stay on the CPU when that is a GPU
        self.place = torch.device("cpu")
        self.put(None)
        self.register_load_state_dict_post_hook(_laid_out_anew)

    def forward(self, x: Tensor) -> Tensor:
        found = held.linear(self, x) if self.layer is None else ops.on_gpu(self, x)
        return found if self.bias is None else found + self.bias

    def unpack(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary layer with the same weights."""
        weight = held.stored(self).dense(dtype).to(self.place)
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
        after = fn(torch.empty(0, dtype=self.dtype, device=self._where()))
        if self.layer is not None and (after.device, after.dtype) == (self.place, self.dtype):
            if self.bias is not None:
                self.bias.data = fn(self.bias.data)
            return self  # it stays where it is, and its packed tensors on the CPU
        super()._apply(fn, recurse)
        held.moved(self, fn)
        self.settle(after.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made for a device: a copy makes its own."""
        return {**self.__dict__, "layer": None, "gpu_tensors": [], "gpu_key": "", "_stored": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        there = self.place.type != "cuda" or torch.cuda.is_available()  # a pickle may come from elsewhere
        self.settle(self.place if there else torch.device("cpu"))

    def settle(self, place: torch.device) -> None:
        """Multiply at ``place`` from now on; on a GPU the weight is laid out there, unless it is not loaded yet."""
        self.place = place
        self.put(None)
        if gpu.here(place) and held.is_ready(self):
            from llmsparse import dispatch  # it lays out what this file defines

            dispatch.lay_out([self])

    def put(self, layer: gpu.Layer | None) -> None:
        """Multiply by ``layer`` on a GPU, or, with None, by the packed tensors where they are."""
        self.layer = layer
        self.gpu_tensors = [] if layer is None else list(layer.tensors)
        self.gpu_key = "" if layer is None else layer.key
        if layer is not None:
            held.keep_on_cpu(self)

    def weight_for_kernels(self) -> tuple[Packed, Tensor, Tensor | None]:
        """The entry, the numbers (out, in) and the scales, at the ``place`` of this layer."""
        tensors = {name: self.get_buffer(name).to(self.place) for name in self.packed.tensors()}
        starts = self.get_buffer("starts").to(self.place) if "starts" in self.parts else None
        return self.packed, gpu.numbers_of(self.packed, tensors, starts), tensors.get("scales")

    def _where(self) -> torch.device:
        packed = self.get_buffer(self.parts[0]).device
        return packed if self.layer is None else self.place

    @property
    def weight(self) -> Tensor:
        """A shape and a dtype, for code that asks for them; ``unpack`` gives values."""
        rows, columns = self.packed.shape
        return held.no_weight(self, (columns, rows) if self.transposed else (rows, columns))


def _laid_out_anew(module: SparseLinear, incompatible: Any) -> None:
    """After ``load_state_dict``: a layout on a GPU is that of the new weight."""
    if module.layer is not None:
        module.settle(module.place)
