"""Where a model's outputs stop being numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.errors import UserError


def refuse_nan(scores: Tensor, model: Any, ids: Tensor, name: str) -> None:
    """Raise a UserError that names the first layer at fault if ``scores``, computed from ``ids``, hold NaN."""
    if scores.isnan().any():
        raise UserError(f"the outputs of {name} are NaN: {first_nonfinite(model, ids)}")


@torch.inference_mode()
def first_nonfinite(model: Any, ids: Tensor) -> str:
    """The first module whose output on ``ids`` (batch, tokens) is not finite, and whether its weights are."""
    found: list[tuple[str, nn.Module]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not found and not all(part.isfinite().all() for part in _floats(output)):
                found.append((name, module))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "no layer's output shows it; the computation after the last layer does it"
    name, module = found[0]
    bad = [key for key, value in module.named_parameters() if not value.isfinite().all()]
    if bad:
        return (
            f"the weights {name}.{bad[0]} are not finite, and the first output that is not is that of {name}"
        )
    advice = "" if model.dtype == torch.float32 else "; its weights are finite, so try --dtype float32"
    return f"the first output that is not finite is that of {name}{advice}"


def _floats(output: Any) -> list[Tensor]:
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
