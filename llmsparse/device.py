"""Where forward passes run, and in which number format."""

import torch

from llmsparse.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1``... into a device; auto prefers an accelerator.

    Raises:
        UserError: the device is unknown or absent.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is not a device name; use auto, cpu or cuda") from error
    if chosen.type != "cpu" and (accelerator is None or chosen.type != accelerator.type):
        found = accelerator.type if accelerator else "only the CPU"
        raise UserError(f"--device {device} was asked for, but {found} is available; use --device auto")
    return chosen


def forward_dtype(dtype: str, checkpoint_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of forward passes: as asked, or the checkpoint's own where the device multiplies it natively.

    A CPU without 16-bit matrix instructions emulates them several times slower than float32, which holds
    every bfloat16 and float16 value exactly; there ``auto`` means float32.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype} is unknown; use auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type != "cpu" or checkpoint_dtype == torch.float32:
        return checkpoint_dtype
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(checkpoint_dtype)
    return checkpoint_dtype if native is not None and native() else torch.float32
