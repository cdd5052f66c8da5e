"""2:4 weights times many tokens: torch's semi-structured product (cuSPARSELt), with its search among algorithms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsparse.kernels import trial, two_of_four
from llmsparse.kernels.widen import FLOATS

INPUTS = {values: (dtype,) for values, dtype in FLOATS.items()}  # of values
MULTIPLE = 16  # of rows and columns, which cuSPARSELt asks of 16-bit weights
TOKENS = 8  # and of tokens


def why_not(numbers: Tensor, values: str) -> str | None:
    """Why cuSPARSELt cannot hold a weight; None where it can."""
    if values not in FLOATS:
        return f"cuSPARSELt takes bf16 and fp16 here, not {values}"
    if any(size % MULTIPLE for size in numbers.shape):
        return f"cuSPARSELt needs rows and inputs in multiples of {MULTIPLE}, not {list(numbers.shape)}"
    return two_of_four.why_not(numbers)


def usable(device: torch.device, values: str, inputs: torch.dtype) -> str | None:
    """Why it does not run on ``device``."""
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt here"
    numbers, _, dense = trial.weight(values, (64, 64), device)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(device, inputs)
    wanted = x.double() @ dense.T
    error = float((product(pack(numbers, values), x, 0).double() - wanted).norm() / wanted.norm())
    return None if error < trial.ALLOWED else f"its product is wrong by {error:.2g} of its norm"


def pack(numbers: Tensor, values: str, scales: Tensor | None = None) -> tuple[Tensor]:
    """cuSPARSELt's own compressed form: kept values, then metadata; 1.125 bytes a weight."""
    return (torch._cslt_compress(numbers.view(FLOATS[values])),)


def search(tensors: Sequence[Tensor], x: Tensor) -> int:
    """The fastest of cuSPARSELt's algorithms for as many tokens as ``x`` has; waits for the GPU."""
    return int(torch._cslt_sparse_mm_search(tensors[0], _padded(x).T, transpose_result=True))


def product(tensors: Sequence[Tensor], x: Tensor, algorithm: int) -> Tensor:
    """x (tokens, in) of the weight's dtype -> (tokens, out)."""
    found = torch._cslt_sparse_mm(tensors[0], _padded(x).T, transpose_result=True, alg_id=algorithm)
    return found[: len(x)]


def _padded(x: Tensor) -> Tensor:
    missing = -len(x) % TOKENS
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
