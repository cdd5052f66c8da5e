"""A packed weight on a GPU: laid out anew for the kernels there, and multiplied in the way that its tokens ask for."""

import importlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llmsparse import bits
from llmsparse.errors import first_line
from llmsparse.packed import Packed

LOG = logging.getLogger("llmsparse")
KERNELS = ("nm_mma", "nm_gemv", "n16_gemv", "bitmask_gemv")  # among equals the first
CUSPARSELT = "nm_cusparselt"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BUCKETS = (
    1,
    4,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
    1024,
    4096,
)  # tokens up to which a way was timed; the last for more
REPEATS = 4  # products in which tokens beyond a kernel's most may come


@dataclass
class Layer:
    """One weight as GPUs multiply it.

    ``kernel``: the file of kernels/ whose layout the first ``count`` tensors are, or None; ``prefill``: ``nm_cusparselt``,
    or ``dense`` for the weight itself (out, in), or None. ``ways``: for each number of ``BUCKETS`` ``kernel``, ``unpack``
    (then torch's dense product) or ``prefill``, with cuSPARSELt's algorithm.
    """

    packed: Packed
    dtype: torch.dtype
    kernel: str | None
    prefill: str | None
    tensors: tuple[Tensor, ...]
    count: int
    ways: dict[int, tuple[str, int]]

    def __reduce__(self) -> Any:
        """A copied or pickled model makes its own anew."""
        return type(None), ()

    @cached_property
    def key(self) -> str:
        """All that the operators need to know beside the tensors, as text: they take no objects."""
        own = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernel": self.kernel,
            "prefill": self.prefill,
            "count": self.count,
            "ways": self.ways,
        }
        return json.dumps({**json.loads(self.packed.key), "gpu": own})

    @classmethod
    def parse(cls, key: str, tensors: Sequence[Tensor]) -> "Layer":
        """The reverse of ``key``."""
        return replace(_parsed(key), tensors=tuple(tensors))

    @property
    def bytes(self) -> int:
        """What it takes on the GPU."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def linear(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        rows = x.reshape(-1, self.packed.shape[1]).contiguous()
        if rows.data_ptr() % 16:  # a slice of something: pairs and cuSPARSELt's rows begin at multiples
            rows = rows.clone()
        with on(rows.device):
            if len(rows) == 0:
                found = rows.new_empty(0, self.packed.shape[0])
            elif rows.dtype != self.dtype:  # no layout is made for it
                found = torch.nn.functional.linear(rows, self.dense(rows.dtype))
            else:
                way, algorithm = self.ways[next((b for b in BUCKETS if len(rows) <= b), BUCKETS[-1])]
                found = self.by(way, rows, algorithm)
        return found.view(*x.shape[:-1], self.packed.shape[0])

    def by(self, way: str, rows: Tensor, algorithm: int = 0) -> Tensor:
        """The product with ``rows`` (tokens, in) of the layer's dtype, in one of the ways that it has."""
        if way == "kernel":
            return self._by_kernel(rows)
        if way == "prefill" and self.prefill == CUSPARSELT:
            return _kernel(CUSPARSELT).product(self.tensors[self.count :], rows, algorithm)
        return torch.nn.functional.linear(rows, self.dense(rows.dtype))

    def _by_kernel(self, rows: Tensor) -> Tensor:
        assert self.kernel is not None
        kernel, held = _kernel(self.kernel), self.tensors[: self.count]
        most = kernel.MAX_TOKENS
        parts = [
            kernel.linear(held, self.packed.shape, self.packed.values, part) for part in rows.split(most)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight (out, in), in memory that the allocator gives to one layer after another."""
        if self.prefill == "dense":
            return self.tensors[-1].to(dtype)
        if self.kernel is None:  # cuSPARSELt gives no weight back, but its product with the unit matrix does
            unit = torch.eye(self.packed.shape[1], dtype=self.dtype, device=self.tensors[0].device)
            return self.by("prefill", unit).T.to(dtype)
        stored = self.packed.kind.float_dtype or dtype
        out = torch.empty(self.packed.shape, dtype=stored, device=self.tensors[0].device)
        unpack = _kernel(f"{self.kernel}_unpack").unpack
        unpack(self.tensors[: self.count], self.packed.shape, self.packed.values, out)
        return out.to(dtype)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """gradient (..., out) times the weight: (..., in)."""
        with on(gradient.device):
            return gradient @ self.dense(gradient.dtype)


@lru_cache(maxsize=4096)
def _parsed(key: str) -> Layer:
    """All of a layer but its tensors."""
    entry = json.loads(key)
    own = entry.pop("gpu")
    ways = {int(tokens): (way, algorithm) for tokens, (way, algorithm) in own["ways"].items()}
    packed, dtype = Packed.parse("a packed weight", entry), getattr(torch, own["dtype"])
    return Layer(packed, dtype, own["kernel"], own["prefill"], (), own["count"], ways)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """While ``device`` is the current one, on which Triton launches and graphs are captured."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def here(device: torch.device) -> bool:
    """Whether these kernels are for ``device``."""
    return device.type == "cuda"


def why_not(name: str, packed: Packed, numbers: Tensor, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot hold ``numbers`` (out, in) of a weight whose inputs are ``dtype``, or does not run here."""
    if packed.values == "fp32":
        return "no kernel takes fp32 values"
    kernel = _kernel(name)
    if (reason := kernel.why_not(numbers, packed.values)) is not None:
        return reason
    takes = getattr(kernel, "INPUTS", {}).get(packed.values, DTYPES)
    if dtype not in takes:
        names = " or ".join(str(each).removeprefix("torch.") for each in takes)
        return f"its inputs must be {names}, not {str(dtype).removeprefix('torch.')}"
    return unusable(name, numbers.device, packed.values, dtype)


@cache
def unusable(name: str, device: torch.device, values: str, inputs: torch.dtype) -> str | None:
    """Why a kernel does not run on ``device``, found once, and told; None where it does."""
    try:
        with on(device):
            reason = _tried(name, device, values, inputs)
    except Exception as error:  # whatever a compiler or a driver raises: the next kernel takes over
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason is not None:
        LOG.warning("%s is not used on %s: %s", name, device, reason)
    return reason


def _tried(name: str, device: torch.device, values: str, inputs: torch.dtype) -> str | None:
    """What a kernel's own test, and the product and the unpacking of a small weight, find wrong."""
    kernel = _kernel(name)
    if hasattr(kernel, "usable") and (reason := kernel.usable(device, values, inputs)) is not None:
        return reason
    if name == CUSPARSELT:
        return None
    from llmsparse.kernels import trial

    return trial.wrong(kernel, _kernel(f"{name}_unpack"), device, (values, inputs))


@cache
def _kernel(name: str) -> ModuleType:
    return importlib.import_module(f"llmsparse.kernels.{name}")


@cache
def why_no_kernels() -> str | None:
    """Why there are no kernels for GPUs here; None where there are."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


def numbers_of(packed: Packed, tensors: dict[str, Tensor], starts: Tensor | None) -> Tensor:
    """The stored numbers and the zeros between them, (out, in)."""
    out, columns = packed.shape
    dtype = torch.int8 if packed.kind.float_dtype is None else packed.kind.dtype
    found = torch.empty(out, columns, dtype=dtype, device=next(iter(tensors.values())).device)
    for first, last in bits.panels(out, columns):
        found[first:last] = packed.numbers(tensors, first, last, starts)
    return found


def pack(name: str, packed: Packed, numbers: Tensor, scales: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors of a kernel's layout."""
    return tuple(_kernel(name).pack(numbers, packed.values, scales))


def max_tokens(name: str) -> int:
    """How many tokens are worth trying with a kernel."""
    return _kernel(name).MAX_TOKENS * REPEATS


def search(layer: Layer, rows: Tensor) -> int:
    """cuSPARSELt's fastest algorithm for ``rows``; waits for the GPU."""
    return _kernel(CUSPARSELT).search(layer.tensors[layer.count :], rows)
