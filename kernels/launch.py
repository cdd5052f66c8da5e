"""How a Triton kernel is launched: what the offline compiler, the tests of its machine code and the tuner need to know."""

from typing import Any, NamedTuple


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
