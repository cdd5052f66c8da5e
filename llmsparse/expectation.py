"""What a run will need, before it begins: memory, and the time of its pruning."""

import re
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch

from llmsparse import chain
from llmsparse.coordinates import KEPT
from llmsparse.solution import Needs
from llmsparse.statistics import Gram

if TYPE_CHECKING:
    from llmsparse.plan import Job


def peaks(job: "Job") -> dict[str, int]:
    """Expected peaks beyond the imports: a block, its passes, the largest solve, the hidden states."""
    itemsize, recipe = job.dtype.itemsize, job.recipe
    assert recipe.samples and recipe.sequence_length
    weights = [w for w in job.skeleton.weights if w.block is not None]
    blocks = Counter[int]()
    for w in weights:
        blocks[w.block or 0] += w.out_features * w.in_features
    inside = sum(w.out_features * w.in_features * job.checkpoint.dtype(w.source).itemsize for w in weights)
    outside = sum(job.checkpoint.bytes(n) for n in job.checkpoint.names()) - inside
    largest = job.weights or weights  # what makes a model smaller solves some of all of them
    solve = max(_solve_bytes(each, w.out_features, w.in_features) for w in largest for each in _needs(job))
    waiting = hidden = 0
    if job.solver.statistics is not None:
        batch = min(job.batch_size(), recipe.samples)
        waiting = min(-(-recipe.samples // batch), job.passes_kept(batch)) * job.pass_bytes(batch)
        hidden = (
            recipe.samples
            * recipe.sequence_length
            * job.skeleton.config.get_text_config().hidden_size
            * itemsize
        ) * (2 if job.follows_dense or job.reconstruction else 1)
    models = max(getattr(job.allocator, "models", 0), 1 if job.sampling else 0)  # held whole at a time
    block = max(blocks.values()) * itemsize * (2 if job.crosses else 1)
    if job.reconstruction:  # float32 weights, gradients, two moments, the best so far, and the stored ones
        solve = max(solve, 6 * 4 * max(blocks.values()))
    work = max(block + solve + waiting, outside)
    work = max(work, models * job.coverage()["all_parameters"] * itemsize)
    here = {"cpu": "host", "none": "device", "disk": "disk"}[recipe.offload]
    if job.device.type == "cpu":
        return {"peak_host_bytes": work + (hidden if here != "disk" else 0), "peak_device_bytes": 0}
    return {
        "peak_host_bytes": max(blocks.values()) * itemsize + (hidden if here == "host" else 0),
        "peak_device_bytes": work + (hidden if here == "device" else 0),
    }


def _needs(job: "Job") -> list[Needs]:
    """Of the solver and of those that it holds."""
    return [getattr(part, "needs", Needs()) for part in chain.parts(job.solver)]


def _solve_bytes(needs: Needs, out: int, inputs: int) -> int:
    """Float32 tensors of one solve, and the inverses that are kept: at least one, however large."""
    square = 4 * inputs**2
    kept = min(needs.inverses * square, max(KEPT, square))
    return needs.weights * 4 * out * inputs + needs.squares * square + kept


def uncounted(job: "Job", written: bool) -> list[str]:
    """What comes before the pruning itself, of which ``seconds`` knows nothing; ``written``: the model writes its text."""
    steps = {
        "writing the model's own text": written,
        "making the model smaller": job.shrinks,
        "ordering channels": job.recipe.permute,
        "dividing the budget": job.recipe.allocate != "uniform",
    }
    return [step for step, taken in steps.items() if taken]


def seconds(job: "Job") -> float:
    """A forward pass, the Grams of distinct inputs and the solves, at the measured speeds of matrix products.

    Grams and solves are float32, whatever forward passes are.
    """
    recipe = job.recipe
    assert recipe.samples and recipe.sequence_length
    forward, work = 0.0, float(sum(20 * w.out_features * w.in_features for w in job.weights))
    if job.solver.statistics is not None:
        tokens = recipe.samples * recipe.sequence_length
        passes = 1 + job.follows_dense  # forward through every block
        if (
            job.reconstruction
        ):  # the aim where it is not the dense model's, training (backward is twice forward), and on
            passes += (not job.follows_dense) + 3 * job.reconstruction.epochs + 1
        inside = sum(w.out_features * w.in_features for w in job.skeleton.weights if w.block is not None)
        forward += 2 * tokens * inside * passes
        if job.solver.statistics is Gram:
            own = [
                w for w in job.weights if not re.search(r"\b(k_proj|v_proj|up_proj|w3)\b", w.name)
            ]  # share an input
            work += sum(
                1.2 * tokens * w.in_features**2 + 2 * w.in_features**3 for w in own if w.expert is None
            )
            products = sum(each.products for each in _needs(job))
            work += sum(2 * products * w.out_features * w.in_features**2 for w in job.weights)
    return (
        forward / _flops(job.device, job.dtype)
        + work / _flops(job.device, torch.float32)
        + 2 * sum(map(job.checkpoint.bytes, job.checkpoint.names())) / 1e9
    )


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """Half the best of a few matrix products: what a real forward pass reaches."""
    matrix = torch.randn(1024, 1024, device=device).to(dtype)
    best = float("inf")
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 0.5 * 2 * 1024**3 / best
