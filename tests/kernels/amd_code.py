"""Compile the launches of a kernel for an AMD GPU that is not here: a JSON row each.

python tests/kernels/amd_code.py nm_gemv
"""

import importlib
import json
import re
import sys
from typing import Any

from machine_code import compile_for


def facts(launch: Any) -> dict[str, Any]:
    """Bytes of scratch memory (spills); loads of 128 bits, which waves of 64 lanes need wider tiles for."""
    code = compile_for(launch, "gfx942").asm["amdgcn"]
    scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)
    return {
        "launch": launch.name,
        "scratch": int(scratch[1]) if scratch else None,
        "wide": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
    }


if __name__ == "__main__":
    for one in importlib.import_module(f"llmsparse.kernels.{sys.argv[1]}").launches():
        print(json.dumps(facts(one)))
