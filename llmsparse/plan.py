"""What a run will do, cost and save, before any weight is loaded."""

import re
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from llmsparse import plugins
from llmsparse.checkpoint import Checkpoint
from llmsparse.device import forward_dtype, pick_device
from llmsparse.errors import UserError
from llmsparse.pattern import Pattern, describe, parse
from llmsparse.recipe import Recipe, with_options
from llmsparse.skeleton import Skeleton, Weight


@dataclass
class Job:
    """A checked run: everything that needs no weight and no text is decided here."""

    recipe: Recipe
    checkpoint: Checkpoint
    skeleton: Skeleton
    solver: Any
    patterns: dict[str, Pattern]  # weight name -> pattern
    dtype: torch.dtype
    device: torch.device

    @property
    def weights(self) -> list[Weight]:
        """The weights that will be pruned, in the model's order."""
        return [w for w in self.skeleton.weights if w.name in self.patterns]

    def coverage(self) -> dict[str, Any]:
        """Pruned parameters over all parameters and over those of all linears."""
        sizes = {w.name: w.out_features * w.in_features for w in self.skeleton.weights if w.block is not None}
        pruned = sum(w.out_features * w.in_features for w in self.weights)
        head = sum(w.out_features * w.in_features for w in self.weights if w.block is None)
        linear = sum(sizes.values()) + head
        everything = sum(
            self.checkpoint.bytes(n) // self.checkpoint.dtype(n).itemsize for n in self.checkpoint.names()
        )
        return {
            "pruned_parameters": pruned,
            "linear_parameters": linear,
            "all_parameters": everything,
            "of_linear": pruned / linear if linear else 0.0,
            "of_all": pruned / everything,
        }


def prepare(model: str | Path, recipe: Recipe) -> Job:
    """Resolve and check a run; refuses exactly what ``prune`` refuses before it reads a weight."""
    make = plugins.load("solvers", recipe.solver).solver
    options = recipe.solver_options()
    known = [f.name for f in fields(make)]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(
            f"--set {unknown[0]}: {recipe.solver} has no such option; it has {', '.join(known) or 'none'}"
        )
    try:
        solver = make(**options)
    except TypeError as error:
        raise UserError(f"--set {' '.join(recipe.set)}: {recipe.solver} cannot use it ({error})") from error
    rules = [_rule(text, recipe.scope) for text in recipe.pattern]
    device = pick_device(recipe.device)
    checkpoint = Checkpoint.open(model, recipe.revision, recipe.token, recipe.cache_dir)
    config = checkpoint.config(recipe.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{model} is quantised; prune the unquantised checkpoint")
    stored = getattr(config, "dtype", None) or checkpoint.dtype(checkpoint.names()[0])
    dtype = forward_dtype(recipe.dtype, stored, device)
    skeleton = Skeleton(checkpoint, dtype, recipe.trust_remote_code)
    if not skeleton.blocks:
        raise UserError(f"{model} has no decoder blocks")
    patterns = assign(skeleton, rules, recipe)
    return Job(with_defaults(recipe, config), checkpoint, skeleton, solver, patterns, dtype, device)


def with_defaults(recipe: Recipe, config: Any) -> Recipe:
    """Fill in the sample count and length, and refuse windows longer than the model takes."""
    builtin = recipe.calibration == "builtin"
    samples = recipe.samples or (64 if builtin else 128)
    limit = getattr(config, "max_position_embeddings", None)
    length = recipe.sequence_length or min(512 if builtin else 2048, limit or 2048)
    if limit and length > limit:
        raise UserError(
            f"--sequence-length {length} is more than the model's max_position_embeddings, {limit}"
        )
    return replace(recipe, samples=samples, sequence_length=length)


def _rule(text: str, scope: str | None) -> tuple[re.Pattern[str] | None, Pattern]:
    expression, equals, pattern = text.rpartition("=")
    if not equals:
        return None, parse(text, scope)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise UserError(f"--pattern {text}: {expression!r} is not a regular expression: {error}") from error
    return compiled, parse(pattern, scope if pattern.rstrip().endswith("%") else None)


def assign(skeleton: Skeleton, rules: list, recipe: Recipe) -> dict[str, Pattern]:
    """Weight name -> pattern: the last matching REGEX=PATTERN, else the last plain pattern."""
    default = [pattern for expression, pattern in rules if expression is None]
    patterns: dict[str, Pattern] = {}
    for option in ("skip", "include"):
        for expression in getattr(recipe, option):
            if not any(_matches([expression], w) for w in skeleton.weights):
                names = ", ".join(w.name for w in skeleton.weights[:2])
                raise UserError(
                    f"--{option} {expression!r} matches no linear weight; their names look like {names}"
                )
    used = set()
    for weight in skeleton.weights:
        if _matches(recipe.skip, weight) or (weight.block is None and not _matches(recipe.include, weight)):
            continue
        special = [
            i for i, (expression, _) in enumerate(rules) if expression and _matches([expression], weight)
        ]
        used.update(special)
        if special or default:
            patterns[weight.name] = rules[special[-1]][1] if special else default[-1]
            _check_width(weight, patterns[weight.name])
    for index, (expression, pattern) in enumerate(rules):
        if expression is not None and index not in used:
            raise UserError(
                f"--pattern {expression.pattern}={pattern} matches no weight that is to be pruned"
            )
    if not patterns:
        raise UserError("nothing is left to prune; loosen --skip, or give a plain --pattern such as 50%")
    return patterns


def _matches(expressions: Any, weight: Weight) -> bool:
    return any(re.search(e, weight.name) or re.search(e, weight.parameter) for e in expressions)


def _check_width(weight: Weight, pattern: Pattern) -> None:
    if pattern.width and weight.in_features % pattern.width:
        raise UserError(
            f"pattern {pattern} needs in_features divisible by {pattern.width}; {weight.name} has "
            f"{weight.in_features}; exclude it with --skip"
        )


def plan(model: str | Path, *, recipe: Any = None, **options: Any) -> dict[str, Any]:
    """What ``prune`` would do with the same options: weights, patterns, coverage, bytes, memory and time.

    Reads config and file headers only. Bytes and seconds are plain numbers; the time is an estimate from a
    short measurement of this machine's matrix products.

    Raises:
        UserError: whatever ``prune`` would refuse before it loads a weight.
    """
    job = prepare(model, Recipe.of(recipe, options))
    r = job.recipe
    size = sum(job.checkpoint.bytes(name) for name in job.checkpoint.names())
    calibrated = job.solver.statistics is not None
    return {
        "model": str(model),
        "architecture": job.skeleton.config.model_type,
        "solver": r.solver,
        "calibration": f"{r.calibration}, {r.samples} x {r.sequence_length}"
        if calibrated
        else "none (data-free solver)",
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": str(job.device),
        "blocks": len(job.skeleton.blocks),
        "weights": [
            {
                "name": w.name,
                "shape": [w.out_features, w.in_features],
                "pattern": describe(job.patterns[w.name]),
            }
            for w in job.weights
        ],
        "coverage": job.coverage(),
        "read_bytes": size,
        "write_bytes": size,
        **_memory(job, calibrated),
        "seconds_estimate": _seconds(job) if calibrated else size / 2e8,
    }


plan.__signature__ = with_options(plan)  # type: ignore[attr-defined]


def _memory(job: Job, calibrated: bool) -> dict[str, int]:
    """Expected peaks beyond the imports: one block, its statistics, the largest solve, and the hidden states."""
    itemsize = job.dtype.itemsize
    blocks: dict[int | None, int] = {}
    inputs: dict[int | None, set[tuple[str, int]]] = {}
    for w in job.skeleton.weights:
        blocks[w.block] = blocks.get(w.block, 0) + w.out_features * w.in_features * itemsize
        inputs.setdefault(w.block, set()).add((w.parameter.rsplit(".", 2)[0], w.in_features))
    outside = sum(job.checkpoint.bytes(n) for n in job.checkpoint.names()) - sum(
        w.out_features * w.in_features * job.checkpoint.dtype(w.source).itemsize
        for w in job.skeleton.weights
        if w.block is not None
    )
    block = max(size for key, size in blocks.items() if key is not None)
    solve = 4 * max(4 * w.out_features * w.in_features + 4 * w.in_features**2 for w in job.weights)
    grams = 4 * max(sum(width**2 for _, width in group) for group in inputs.values()) if calibrated else 0
    recipe = job.recipe
    assert recipe.samples and recipe.sequence_length
    width = getattr(job.skeleton.config, "hidden_size", 0)
    hidden = recipe.samples * recipe.sequence_length * width * itemsize if calibrated else 0
    work = max(block + grams + solve, outside)
    on_device = job.device.type != "cpu"
    return {
        "peak_host_bytes": hidden + (block if on_device else work),
        "peak_device_bytes": work if on_device else 0,
    }


def _seconds(job: Job) -> float:
    """Two forward passes, the Grams and the factorisations, at the measured speed of a matrix product."""
    recipe = job.recipe
    assert recipe.samples and recipe.sequence_length
    tokens = recipe.samples * recipe.sequence_length
    parameters = sum(w.out_features * w.in_features for w in job.skeleton.weights if w.block is not None)
    shared = {(w.parameter.rsplit(".", 2)[0], w.in_features) for w in job.weights}
    gram = sum(tokens * width**2 + 2 * width**3 for _, width in shared)
    solve = sum(3 * w.out_features * w.in_features**2 for w in job.weights)
    return (4 * tokens * parameters + gram + solve) / _flops(job.device, job.dtype)


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
