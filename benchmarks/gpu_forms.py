"""The forms in which a GPU multiplies by a linear weight: cuBLAS, each Triton kernel, cuSPARSELt, torch's int4."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from llmsparse import plugins
from llmsparse.pattern import Unstructured, parse

EXPECTED = ("bitmask_gemv", "n16_gemv", "nm_gemv", "nm_mma")  # absent ones are told, and others are found
PATTERNS = ("50%", "8:16", "2:4")  # the freest first: a kernel is measured on the freest that it holds
INTEGERS = ("int8", "int4:32")
UNPACK_FROM = 32  # tokens; below, unpacking cannot pay
Tensors = tuple[Tensor, ...]


class Unavailable(Exception):
    """Why a form cannot be measured here."""


class Held(NamedTuple):
    """A weight as one form stores it."""

    tensors: Tensors
    pattern: str
    exact: Callable[[], Tensor]  # (out, in) float64, the weight that the tensors stand for
    prepare: Callable[[Tensors, Tensor], tuple[Callable[[Tensors], Tensor], dict[str, Any]]]


class Form(NamedTuple):
    """A way to multiply; ``hold`` raises Unavailable or anything else where it cannot."""

    name: str
    values: str
    least: int
    most: int
    hold: Callable[["Weights"], Held]


@dataclass
class Weights:
    """Random weights of one shape, pruned by magnitude; made anew whenever they are asked for."""

    shape: tuple[int, int]
    device: torch.device

    def dense(self) -> Tensor:
        """(out, in) bf16 of unit gain."""
        random = torch.Generator(self.device).manual_seed(0)
        weight = torch.randn(self.shape, generator=random, device=self.device)
        return (weight * self.shape[1] ** -0.5).to(torch.bfloat16)

    def numbers(self, pattern: str, values: str) -> tuple[Tensor, Tensor | None]:
        """The bits of bf16 or the codes, and the scales."""
        weight, chosen = self.dense(), parse(pattern)
        chosen = chosen.scoped("row") if isinstance(chosen, Unstructured) else chosen
        mask = chosen.select(weight.float().abs())
        if values == "bf16":
            return weight.masked_fill(~mask, 0.0).view(torch.int16), None
        group, most = (self.shape[1], 127) if values == "int8" else (int(values.partition(":")[2]), 7)
        if self.shape[1] % group:
            raise Unavailable(f"{self.shape[1]} inputs are not groups of {group}")
        grouped = weight.float().view(self.shape[0], -1, group)
        scales = (grouped.abs().amax(2, keepdim=True) / most).to(torch.bfloat16)
        codes = (grouped / scales.float()).round().clamp(-most, most)
        codes = torch.where(codes == 0, grouped.sign(), codes)  # kept is stored: the pattern stays exact
        codes = codes.view(self.shape).masked_fill(~mask, 0.0).to(torch.int8)
        return codes, scales.squeeze(2).contiguous()

    def exact(self, pattern: str, values: str) -> Tensor:
        numbers, scales = self.numbers(pattern, values)
        if scales is None:
            return numbers.view(torch.bfloat16).double()
        grouped = numbers.double().view(self.shape[0], scales.shape[1], -1)
        return (grouped * scales.double()[:, :, None]).view(self.shape)


def forms() -> Iterator[Form]:
    """cuBLAS first: the others are compared with it."""
    yield Form("cuBLAS bf16", "bf16", 1, 1 << 30, _cublas)
    found = [name for name in plugins.names("kernels") if not name.endswith("_unpack")]
    for name in sorted({*EXPECTED, *found}):
        yield from _of_kernel(name)
    yield Form("cuSPARSELt bf16", "bf16", 1, 1 << 30, _cusparselt)
    yield Form("torch int4", "int4", 1, 1 << 30, _int4)


def _of_kernel(name: str) -> Iterator[Form]:
    """The forms of llmsparse.kernels.<name> and of the file that unpacks its layout."""
    module = _module(name)
    if isinstance(module, ModuleType) and not hasattr(module, "linear"):
        return  # a kernel, but not a product
    most = getattr(module, "MAX_TOKENS", UNPACK_FROM)
    for values in ("bf16", *INTEGERS):
        last = most if values == "bf16" or most > 8 else 1  # codes with several tokens: tensor cores alone
        yield Form(f"{name} {values}", values, 1, last, partial(_triton, module, None, values))
    unpack = _module(f"{name}_unpack")
    least = min(UNPACK_FROM, most + 1)
    hold = partial(_triton, module, unpack, "bf16")
    yield Form(f"{name}_unpack + cuBLAS", "bf16", least, 1 << 30, hold)


def _module(name: str) -> ModuleType | Unavailable:
    if name not in plugins.names("kernels"):
        return Unavailable(f"there is no kernels/{name}.py")
    try:
        return importlib.import_module(f"llmsparse.kernels.{name}")
    except Exception as error:  # a kernel's file that does not import is a row, and not the end of the run
        return Unavailable(f"kernels/{name}.py cannot be imported: {rows.reason(error)}")


def _cublas(weights: Weights) -> Held:
    def prepare(tensors: Tensors, x: Tensor) -> Any:
        return lambda copy: F.linear(x, copy[0]), {}

    return Held((weights.dense(),), "dense", lambda: weights.dense().double(), prepare)


def _triton(module: Any, unpack: Any, values: str, weights: Weights) -> Held:
    for part in (module, unpack):
        if isinstance(part, Unavailable):
            raise part
    pattern, numbers, scales = _held_pattern(module, values, weights)
    tensors = module.pack(numbers, values, scales)
    shape = weights.shape

    def prepare(tensors: Tensors, x: Tensor) -> Any:
        if unpack is None:
            return lambda copy: module.linear(copy, shape, values, x), {}
        scratch = torch.empty(shape, dtype=x.dtype, device=x.device)

        def unpacked(copy: Tensors) -> Tensor:
            unpack.unpack(copy, shape, values, scratch)
            return F.linear(x, scratch)

        return unpacked, {}

    return Held(tuple(tensors), pattern, lambda: weights.exact(pattern, values), prepare)


FREEST: dict[str, str] = {}  # kernel -> the pattern that it held last: a refusal costs as much as a weight


def _held_pattern(module: Any, values: str, weights: Weights) -> tuple[str, Tensor, Tensor | None]:
    refused = {}
    for pattern in sorted(PATTERNS, key=lambda pattern: pattern != FREEST.get(module.__name__)):
        numbers, scales = weights.numbers(pattern, values)
        why = module.why_not(numbers, values)
        if why is None:
            FREEST[module.__name__] = pattern
            return pattern, numbers, scales
        refused[pattern] = why
    raise Unavailable("refused; " + "; ".join(f"{pattern}: {refused[pattern]}" for pattern in PATTERNS))


def _cusparselt(weights: Weights) -> Held:
    if weights.device.type != "cuda" or not torch.backends.cusparselt.is_available():
        raise Unavailable("cuSPARSELt needs a CUDA device, and a torch that is built with it")
    numbers, _ = weights.numbers("2:4", "bf16")
    dense = numbers.view(torch.bfloat16)
    sparse: Any = torch.sparse.to_sparse_semi_structured(dense)
    return Held((sparse.packed,), "2:4", lambda: weights.exact("2:4", "bf16"), _prepare_cusparselt)


def _prepare_cusparselt(tensors: Tensors, x: Tensor) -> Any:
    """The algorithm that cuSPARSELt's own search finds for these shapes; tokens are padded to 8 in the call."""
    padding = -len(x) % 8

    def padded() -> Tensor:
        return F.pad(x, (0, 0, 0, padding)) if padding else x

    chosen, search = _search(tensors[0], padded().t())

    def multiply(copy: Tensors) -> Tensor:
        y = torch._cslt_sparse_mm(copy[0], padded().t(), transpose_result=True, **chosen)
        return y[: len(x)]

    return multiply, {**chosen, "search": search, "cusparselt": torch.backends.cusparselt.version()}


def _search(packed: Tensor, x: Tensor) -> tuple[dict[str, int], str]:
    """The arguments of the product that cuSPARSELt found fastest, and the name of the search that torch has."""
    try:
        from torch._C import _cusparselt

        found = _cusparselt.mm_search(packed, x, None, None, None, True)
        return dict(zip(("alg_id", "split_k", "split_k_mode"), found[:3], strict=True)), "mm_search"
    except (ImportError, AttributeError, TypeError):  # an older torch, or another signature
        found = torch._cslt_sparse_mm_search(packed, x, transpose_result=True)
        return {"alg_id": found}, "_cslt_sparse_mm_search"
    except RuntimeError as error:
        return {"alg_id": 0}, f"failed: {rows.reason(error)}"


def _int4(weights: Weights) -> Held:
    """Codes 0 to 15 about 8, a scale for each group, as tinygemm takes them."""
    outputs, inputs = weights.shape
    group = next((g for g in (128, 64, 32) if inputs % g == 0), None)
    tiles = next((t for t in (8, 4, 2) if inputs % (16 * t) == 0), None)
    if group is None or tiles is None or outputs % 8:
        raise Unavailable(f"{outputs} x {inputs} does not divide into groups of 32 and tiles of 8 x 32")
    grouped = weights.dense().float().view(outputs, -1, group)
    scales = (grouped.abs().amax(2) / 7).to(torch.bfloat16)  # (out, in / group)
    codes = (grouped / scales.float()[:, :, None]).round().clamp(-8, 7)
    flat = (codes + 8).view(outputs, inputs).to(torch.uint8)
    pairs = flat[:, ::2] << 4 | flat[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    both = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1).contiguous()

    def exact() -> Tensor:
        grouped_codes = flat.double().view(outputs, -1, group) - 8
        return (grouped_codes * scales.double()[:, :, None]).view(outputs, inputs)

    def prepare(tensors: Tensors, x: Tensor) -> Any:
        def multiply(copy: Tensors) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, copy[0], group, copy[1])

        return multiply, {"group": group}

    return Held((packed, both), "dense", exact, prepare)
