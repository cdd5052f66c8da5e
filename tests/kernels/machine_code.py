"""Compile kernels for GPUs that are not here, and read what their machine code costs.

    python tests/kernels/machine_code.py nm_mma --targets 80 90 [--all]

prints a JSON row for each launch (the first alone without --all) and target. A process of its own, since the
interpreter replaces the compiler in the one that runs the other tests.
"""

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def rows(kernel: str, targets: list[int], every: bool) -> Any:
    """Facts of each launch of llmsparse.kernels.<kernel> on each compute capability."""
    module = importlib.import_module(f"llmsparse.kernels.{kernel}")
    launches, contract = module.launches(), getattr(module, "contract", lambda assembly: None)
    for launch in launches if every else launches[:1]:
        for target in targets:
            found = facts(launch, target, contract)
            yield {"kernel": kernel, "launch": launch.name, "target": target, **found}


def facts(launch: Any, target: int, contract: Any) -> dict[str, Any]:
    """Registers, spills and shared memory; instructions of the largest loop, by kind and for each dense weight.

    ``broken``: why what was compiled is not what the kernel relies on.
    """
    import triton

    compiled = compile_for(launch, target)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        usage = USAGE.search(tool("cuobjdump", "-res-usage", str(file)))
        body, everything = loop(tool("nvdisasm", "-c", str(file)))
    assert usage is not None
    registers, stack, shared, local = map(int, usage.groups())
    lanes = len(body) * 32 * launch.warps
    return {
        "triton": triton.__version__,
        "broken": contract(compiled.asm),
        "registers": registers,
        "spills": stack + local,
        "shared": max(shared, compiled.metadata.shared),
        "instructions": len(body),
        "per_weight": lanes / launch.weights if launch.weights else None,
        "loop": dict(collections.Counter(map(opcode, body))),
        "all": dict(collections.Counter(map(opcode, everything))),
    }


def compile_for(launch: Any, target: int | str) -> Any:
    """What Triton makes of ``launch`` for a compute capability, or an architecture of AMD's; no driver is needed."""
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
    vendor, lanes = ("hip", 64) if isinstance(target, str) else ("cuda", 32)
    return triton.compile(source, target=GPUTarget(vendor, target, lanes), options=options)


def tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools that come in Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def loop(disassembly: str) -> tuple[list[str], list[str]]:
    """The instructions of the largest loop (all of them where there is none), and all."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in disassembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
    first, last = 0, 0
    for number, text in enumerate(instructions):
        branch = BRANCH.search(text)
        begin = labels.get(branch[1], number) if branch else number
        if number - begin > last - first:
            first, last = begin, number + 1
    return instructions[first:last] if last else instructions, instructions


def opcode(text: str) -> str:
    """``LDG.128``, ``HMMA.SP``, ``FFMA``...: of loads, stores and matrix instructions their kind, of others the name."""
    name = re.sub(r"^@!?U?P\d+\s+", "", text).split()[0]
    first, *rest = name.split(".")
    if not first.startswith(("LDG", "STG", "LDS", "STS", "LDL", "STL", "HMMA")):
        return first
    kind = [part for part in rest if part in ("64", "128", "U16", "U8", "S8", "SP")]
    return ".".join([first, *kind])


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="+")
    parser.add_argument("--targets", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    for kernel in options.kernels:
        for row in rows(kernel, options.targets, options.all):
            print(json.dumps(row), flush=True)
