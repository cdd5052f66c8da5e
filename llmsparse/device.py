"""Where forward passes run, and in which number format."""

import platform
import re
from pathlib import Path

import torch

from llmsparse.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {  # torch's questions for AMX, and for 16-bit instructions elsewhere
    torch.bfloat16: ("_is_amx_tile_supported", "_is_mkldnn_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported", "_is_mkldnn_fp16_supported"),
}


def pick_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1``... into a device; auto is CUDA or the CPU.

    Raises:
        UserError: the device is unknown or absent.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is not a device name; use auto, cpu or cuda") from error
    if chosen.type == "cpu":
        return chosen
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or chosen.type != accelerator.type:
        found = accelerator.type if accelerator else "only the CPU"
        raise UserError(f"--device {device} was asked for, but {found} is available; use --device auto")
    if (chosen.index or 0) >= torch.accelerator.device_count():
        found = f"{torch.accelerator.device_count()} of them are here, counted from 0"
        raise UserError(f"--device {device} was asked for, but {found}")
    return chosen


def forward_dtype(dtype: str, checkpoint_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of forward passes: as asked, or the checkpoint's own where the device multiplies it natively.

    On a CPU that takes AMX, Arm's bf16 and fp16 instructions, or AMD's AVX-512 bf16 (twice the rate of float32;
    Intel's runs at half of it). Elsewhere 16-bit products are emulated, and ``auto`` means float32, which holds every
    bfloat16 and float16 value exactly.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype} is unknown; use auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type != "cpu" or checkpoint_dtype == torch.float32:
        return checkpoint_dtype
    return checkpoint_dtype if _is_faster_than_float32(checkpoint_dtype) else torch.float32


def _is_faster_than_float32(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the 16-bit ``dtype`` faster than float32 ones."""
    if dtype not in _UNITS or not torch.backends.mkldnn.is_available():
        return False
    amx, native = _UNITS[dtype]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return bool(getattr(torch.ops.mkldnn, native)())
    if _knows(amx):
        return True
    return dtype == torch.bfloat16 and _knows("_is_avx512_bf16_supported") and _is_amd()


def _knows(question: str) -> bool:
    """torch's answer about this CPU; no, of a torch without the question."""
    return bool(getattr(torch.cpu, question, bool)())


def _is_amd() -> bool:
    return "AuthenticAMD" in (_cpu_facts().get("vendor_id"), *platform.processor().split(", "))


def available_memory(device: torch.device) -> int:
    """Bytes that are free on ``device`` now; where the system does not tell, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else 4 << 30


def processor() -> str:
    """The CPU's name, with family and model where Linux tells them."""
    facts = _cpu_facts()
    if not {"model name", "cpu family", "model"} <= facts.keys():
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"


def _cpu_facts() -> dict[str, str]:
    """What Linux tells of the last CPU; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {name.strip(): fact.strip() for name, fact in pairs}
