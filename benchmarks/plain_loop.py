"""The plain published SparseGPT loop, for comparison: whole model in memory, float32, nothing shared.

One Gram and one factorisation per linear, full matrix products, thresholds by a full sort, each window
forwarded twice through each block (arXiv 2301.00774, algorithm 1). For llama-like models
(``model.model.layers``).

    python -m benchmarks.plain_loop MODEL OUT --windows tokens.pt --sparsity 0.5

``tokens.pt`` is a saved int64 tensor (windows, tokens). Prints one JSON line: seconds and peak memory.
"""

import argparse
import contextlib
from typing import Any

import torch
from torch import Tensor, nn

DAMPING = 0.01
CHUNK = 128


@torch.no_grad()
def prune(folder: str, out: str, windows: Tensor, sparsity: float, device: str = "cpu") -> None:
    """Prune the linears of every block to ``sparsity`` and save in the checkpoint's own dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    stored = AutoConfig.from_pretrained(folder).dtype or torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.to(device)
    hidden, arguments = first_inputs(model, windows.to(device))
    for block in model.model.layers:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        collected = {linear: Hessian(linear) for linear in linears}
        hooks = [linear.register_forward_hook(collected[linear].add) for linear in linears]
        for states in hidden:
            forward(block, states, arguments)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            linear.weight.copy_(sparsegpt(linear.weight.clone(), collected.pop(linear).matrix, sparsity))
        hidden = [forward(block, states, arguments) for states in hidden]
    model.to(stored).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


def forward(block: nn.Module, states: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = block(states, **arguments)
    return output[0] if isinstance(output, tuple) else output


class Stop(Exception):
    """Ends a forward pass at the first block."""


def first_inputs(model: Any, windows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first block is given for each window (1, tokens, hidden), and its keyword arguments."""
    hidden: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(_: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        hidden.append(positional[0])
        arguments.update(named)
        raise Stop

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(Stop):
            model(window[None], use_cache=False)
    hook.remove()
    return hidden, arguments


class Hessian:
    """The running mean of 2 x xT over the inputs of one linear, (in, in)."""

    def __init__(self, linear: nn.Linear) -> None:
        self.matrix = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        self.samples = 0

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        count = inputs[0].shape[0]
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).T  # (in, tokens)
        self.matrix *= self.samples / (self.samples + count)
        self.samples += count
        rows = (2 / self.samples) ** 0.5 * rows
        self.matrix += rows @ rows.T


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float) -> Tensor:
    """Prune ``weight`` (out, in): masks chunk by chunk, each column's error spread over the later ones."""
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    weight[:, dead] = 0.0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, weight.shape[1], CHUNK):
        end = min(start + CHUNK, weight.shape[1])
        part = weight[:, start:end].clone()
        factor = upper[start:end, start:end]
        pruned, errors = torch.zeros_like(part), torch.zeros_like(part)
        scores = part**2 / factor.diagonal() ** 2
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        mask = scores <= threshold
        for i in range(end - start):
            column = part[:, i]
            pruned[:, i] = column.masked_fill(mask[:, i], 0.0)
            errors[:, i] = (column - pruned[:, i]) / factor[i, i]
            part[:, i:] -= errors[:, i, None] @ factor[i, i:][None]
        weight[:, start:end] = pruned
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument(
        "--windows", required=True, help="file of int64 tokens (windows, tokens), by torch.save"
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    from benchmarks.process import Measured

    with Measured() as measured:
        windows = torch.load(arguments.windows, weights_only=True)
        prune(arguments.model, arguments.out, windows, arguments.sparsity, arguments.device)
    measured.show()


if __name__ == "__main__":
    main()
