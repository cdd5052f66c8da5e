"""Compile the launches of kernels for an AMD GPU that is not here: a JSON row each.

python tests/kernels/amd_code.py nm_gemv
"""

import importlib
import json
import re
import sys
from typing import Any


def facts(launch: Any) -> dict[str, Any]:
    """Bytes of scratch memory (spills); loads of 128 bits, which waves of 64 lanes need wider tiles for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(launch.kernel.arg_names)
    source = ASTSource(
        fn=launch.kernel,
        signature={name: launch.signature.get(name, "constexpr") for name in names},
        constexprs=launch.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    code = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options).asm["amdgcn"]
    scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)
    return {
        "launch": launch.name,
        "scratch": int(scratch[1]) if scratch else None,
        "wide": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
    }


if __name__ == "__main__":
    for one in importlib.import_module(f"llmsparse.kernels.{sys.argv[1]}").launches():
        print(json.dumps(facts(one)))
