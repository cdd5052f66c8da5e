"""How a Triton kernel is launched: what compiling it without a GPU needs, and the tests of its machine code."""

import os
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One configuration of a kernel.

    ``weights``: dense weights that a program handles in one turn of its main loop, which instructions are counted
    against; 0 where nothing is counted. ``aligned``: arguments that are divisible by 16, as Triton specialises them.
    """

    name: str
    kernel: Any  # what @triton.jit made
    signature: dict[str, str]  # argument -> "*bf16", "*i32", "i32"...
    constants: dict[str, Any]  # tl.constexpr arguments
    warps: int
    weights: int = 0
    aligned: tuple[str, ...] = ()
    stages: int = 1


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels: it knows no instructions of a machine."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def written(dtype: torch.dtype) -> torch.dtype:
    """What kernels write for a result in ``dtype``: float32 in the interpreter, which truncates to bfloat16."""
    return torch.float32 if interprets() else dtype
