"""An embedding whose table stays codes, and an output layer that multiplies by the same table."""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse import held
from llmsparse.packed import Packed


class PackedGather(nn.Embedding):
    """The part of an embedding that looks rows up; a class that scales them, or shifts ids, comes before it."""

    packed: Packed
    parts: tuple[str, ...]
    dtype: torch.dtype  # of the rows that it gives

    def forward(self, input: Tensor) -> Tensor:
        return held.gather(self, input)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A shape and a dtype, for code that asks for them; it has no values."""
        return held.no_weight(self, self.packed.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedGather":
        super()._apply(fn, recurse)
        held.moved(self, fn)
        return self


class PackedHead(nn.Module):
    """logits = x Tᵀ + bias with the table T of an embedding, which holds the only copy."""

    def __init__(self, embedding: PackedGather, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not a part of this module: its tensors are the embedding's
        self.bias = bias
        self.out_features, self.in_features = embedding.packed.shape

    @property
    def table(self) -> PackedGather:
        return self.__dict__["embedding"]

    def forward(self, x: Tensor) -> Tensor:
        where = self.table.get_buffer("scales").device
        found = held.linear(self.table, x.to(where)).to(x.device)
        return found if self.bias is None else found + self.bias


def can_pack(kind: type) -> bool:
    """Whether embeddings of this class look rows up through ``nn.Embedding.forward``."""
    own = [c for c in kind.mro()[: kind.mro().index(nn.Embedding)] if "forward" in vars(c)]
    return all("super().forward(" in inspect.getsource(vars(c)["forward"]) for c in own)


def pack(embedding: nn.Embedding, packed: Packed) -> PackedGather:
    """Turn ``embedding`` itself into one that holds codes; all that its class adds stays."""
    dtype = embedding.weight.dtype
    del embedding._parameters["weight"]
    embedding.__dict__["dense_class"] = type(embedding)
    embedding.__class__ = _packed_class(type(embedding))  # type: ignore[arg-type]
    held.hold(embedding, packed, dtype)
    assert isinstance(embedding, PackedGather)
    return embedding


def unpack(embedding: PackedGather, dtype: torch.dtype) -> nn.Embedding:
    """The reverse of ``pack``, with the weights that the codes stand for."""
    weight = held.stored(embedding).dense(dtype)
    for name in embedding.parts:
        del embedding._buffers[name]
    for name in ("packed", "key", "parts", "_stored", "dtype", "stays_dense", "path"):
        del embedding.__dict__[name]
    embedding.__class__ = embedding.__dict__.pop("dense_class")
    embedding._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return embedding


@lru_cache(maxsize=64)
def _packed_class(kind: type) -> type:
    return PackedGather if kind is nn.Embedding else type(f"Packed{kind.__name__}", (kind, PackedGather), {})
