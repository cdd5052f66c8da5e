"""What a run will do, cost and save, before any weight is loaded."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmsparse import chain, compensation, gridfile
from llmsparse.allocation import Allocator, allocator_of
from llmsparse.calibration import SELF, Calibration, calibrate, parse_sources
from llmsparse.checkpoint import Checkpoint
from llmsparse.device import available_memory, forward_dtype, pick_device
from llmsparse.errors import UserError
from llmsparse.expectation import peaks, seconds, uncounted
from llmsparse.grid import Grid
from llmsparse.narrowing import outlined
from llmsparse.pattern import Existing, Pattern, describe
from llmsparse.producers import may_permute
from llmsparse.recipe import Recipe, with_options
from llmsparse.reconstruct import Reconstruction
from llmsparse.rules import assign, rule
from llmsparse.sampling import Sampler, Sampling, Unwritten
from llmsparse.shrinking import Shrink, refuse_apart, split
from llmsparse.skeleton import Skeleton, Weight
from llmsparse.statistics import Gram
from llmsparse.writer import Beside


@dataclass
class Job:
    """A checked run: everything that needs no weight and no text is decided here."""

    recipe: Recipe
    checkpoint: Checkpoint
    skeleton: Skeleton
    solver: Any
    patterns: dict[str, Pattern]  # weight name -> pattern, uniform until the allocator has divided the budget
    dtype: torch.dtype
    device: torch.device
    allocator: Allocator
    grid: Grid | None = None  # of the weights
    reconstruction: Reconstruction | None = None
    sampling: Sampling | None = None  # of calibration text that the model writes itself
    tables: dict[str, Grid] = field(
        default_factory=dict
    )  # disk name of an embedding or output table -> its grid
    shrinks: tuple[
        Shrink, ...
    ] = ()  # what is to make the model smaller first; the checkpoint is an outline of that

    origin: Checkpoint | None = None  # what the user named, where the checkpoint was made of it

    @property
    def source(self) -> Checkpoint:
        """What the user named."""
        return self.origin or self.checkpoint

    @property
    def weights(self) -> list[Weight]:
        """The weights that will be pruned, in the model's order."""
        return [w for w in self.skeleton.weights if w.name in self.patterns]

    def coverage(self) -> dict[str, Any]:
        """Pruned parameters over all parameters and over those of all linears."""
        pruned = sum(w.out_features * w.in_features for w in self.weights)
        linear = sum(w.out_features * w.in_features for w in self.skeleton.weights)
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

    @property
    def follows_dense(self) -> bool:
        """Whether what the dense model computes is what blocks are to reproduce."""
        return self.recipe.targets == "dense"

    @property
    def crosses(self) -> bool:
        """Whether each weight is aimed at the dense model's inputs before it is solved; reconstruction aims by itself."""
        return self.follows_dense and self.solver.statistics is Gram and self.reconstruction is None

    @property
    def first_token(self) -> float:
        """How often each window's first token counts in the Gram of queries, keys and values."""
        asked = getattr(chain.innermost(self.solver), "first_token", None)
        if asked is not None:
            return asked
        return self.recipe.sequence_length / 2 if self.grid and self.recipe.sequence_length else 1.0

    def quantised(self) -> dict[str, tuple[tuple[int, int], Grid]]:
        """Everything that gets codes: name -> its (out, in) shape and its grid."""
        shapes = {w.name: (w.out_features, w.in_features) for w in self.weights} if self.grid else {}
        shapes |= {name: self.checkpoint.shape(name) for name in self.tables}  # type: ignore[misc]
        return {name: (shape, self.tables.get(name) or self.grid) for name, shape in shapes.items()}  # type: ignore[misc]

    @cached_property
    def adapted(self) -> dict[str, str]:
        """Weight name -> the module of its adapter, of those that get one."""
        return compensation.modules(self.skeleton, self.weights) if self.recipe.compensate else {}

    def beside(self) -> Beside:
        """The files that are written beside the checkpoint's own: tensors and metadata of each."""
        files: Beside = gridfile.beside(self.quantised())
        if paths := self.adapted:
            weights = {w.name: w for w in self.weights}
            rank, dtype = self.recipe.compensate, self.checkpoint.stored_dtype
            files[compensation.NAME] = compensation.layout(weights, paths, rank, dtype), {}
        return files

    def calibrate(self, sampler: Sampler | Unwritten | None = None) -> Calibration | None:
        """The calibration windows; None where no weight is pruned, or by a data-free solver whose allocator wants none."""
        recipe = self.recipe
        if not self.patterns or (self.solver.statistics is None and not self.allocator.windows):
            return None
        assert recipe.samples and recipe.sequence_length
        return calibrate(
            recipe.calibration, self.checkpoint.tokenizer(recipe.trust_remote_code), samples=recipe.samples,
            sequence_length=recipe.sequence_length, seed=recipe.seed, token=recipe.token,
            cache_dir=recipe.cache_dir, vocab_size=self.skeleton.config.get_text_config().vocab_size,
            sampler=sampler,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """The options that must be equal for a resumed run to give the same bytes."""
        free = ("offload", "cache_dir")  # these never change a bit
        options = {key: value for key, value in self.recipe.as_dict().items() if key not in free}
        return {**options, "device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    def tensors(self, block: int) -> list[str]:
        """Names on disk of everything in one block."""
        prefix = f"{self.skeleton.block_path}.{block}."
        return [
            name for p, parts in self.skeleton.sources.items() if p.startswith(prefix) for name, _ in parts
        ]

    def batch_size(self) -> int:
        """Windows a pass: as asked, else as many as gain something."""
        if self.recipe.batch_size != "auto":
            return int(self.recipe.batch_size)
        assert self.recipe.sequence_length
        return max(1, (2048 if self.device.type == "cpu" else 32768) // self.recipe.sequence_length)

    def pass_bytes(self, batch_size: int) -> int:
        """About what one pass holds while it waits inside a block: twice its tensors, for the holes in the heap."""
        assert self.recipe.sequence_length
        widths = [w.in_features + w.out_features for w in self.skeleton.weights if w.block is not None]
        return (
            (8 if self.crosses else 4)
            * batch_size
            * self.recipe.sequence_length
            * max(widths)
            * self.dtype.itemsize
        )

    def passes_kept(self, batch_size: int) -> int:
        """How many passes may wait with their activations in half of the memory that is free now."""
        return max(1, available_memory(self.device) // 2 // self.pass_bytes(batch_size))


def prepare(model: str | Path, recipe: Recipe, headers_only: bool = False, smaller: bool = False) -> Job:
    """Resolve and check a run; refuses exactly what ``prune`` refuses before it reads a weight.

    With ``headers_only`` a hub model's weight files are not downloaded. ``smaller``: what the recipe asks for to make the
    model itself smaller was done already.
    """
    if recipe.solver is None:
        recipe = replace(recipe, solver="sparsegpt" if recipe.values else "alps")
    solver = _solver(recipe)
    shrinks, rules = split([rule(text, recipe.scope) for text in recipe.pattern], recipe)
    if shrinks and not rules:
        if recipe.values is None:
            refuse_apart(recipe, shrinks)
        else:
            rules = [(None, Existing())]  # rounded as it is
    device = pick_device(recipe.device)
    checkpoint = Checkpoint.open(model, recipe.revision, recipe.token, recipe.cache_dir, headers_only)
    config = checkpoint.config(recipe.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{model} is quantised; prune the unquantised checkpoint")
    for shrink in () if smaller else shrinks:
        checkpoint = outlined(checkpoint, shrink, recipe.trust_remote_code)
    dtype = forward_dtype(recipe.dtype, checkpoint.stored_dtype, device)
    skeleton = Skeleton(checkpoint, dtype, recipe.trust_remote_code)
    if not skeleton.blocks:
        raise UserError(f"{model} has no decoder blocks")
    patterns = assign(skeleton, rules, recipe) if rules or not shrinks else {}
    for weight in skeleton.weights:
        stored = checkpoint.dtype(weight.source)
        if weight.name in patterns and (not stored.is_floating_point or stored.itemsize < 2):
            name = str(stored).removeprefix("torch.")
            raise UserError(f"{weight.source} is stored as {name}; prune the unquantised checkpoint")
    values: Any = recipe.values
    grid = Grid.parse(values) if isinstance(values, str) else values
    if patterns and grid is None and all(isinstance(pattern, Existing) for pattern in patterns.values()):
        raise UserError("pattern as-is prunes nothing; give --values too, or another pattern such as 50%")
    if recipe.permute:
        may_permute(skeleton, patterns)
    recipe = with_defaults(recipe, config)
    allocator = allocator_of(recipe.allocate, recipe.options_for("allocate"), recipe.budget, patterns)
    job = Job(recipe, checkpoint, skeleton, solver, patterns, dtype, device, allocator, grid, *_own(recipe))
    job.shrinks = () if smaller else shrinks
    if solver.statistics is None and (job.reconstruction or recipe.targets != "pruned"):
        raise UserError(
            f"solver {recipe.solver} uses no calibration data, which --reconstruct and --targets dense need; take another"
        )
    if job.follows_dense and not (job.crosses or job.reconstruction):
        raise UserError(
            f"solver {recipe.solver} knows norms of its inputs alone, which --targets dense cannot aim; take one with a "
            "Gram matrix (alps, sparsegpt, refit:...), or add --reconstruct"
        )
    if recipe.compensate and job.reconstruction:
        raise UserError(
            "--compensate adds to what the solver leaves, and --reconstruct changes that; give one of them"
        )
    if recipe.compensate and not job.adapted:
        raise UserError(
            "--compensate: no pruned weight is a matrix of its own that PEFT adapts (experts are none); leave it out"
        )
    job.tables = _tables(job)
    return job


def _tables(job: Job) -> dict[str, Grid]:
    """The embedding and output tables that are to be rounded; a tied one is one, a pruned one a weight."""
    asked = job.recipe.embeddings or ("int8" if job.grid else "keep")
    if asked == "keep":
        return {}
    if job.grid is None:
        raise UserError(
            f"--embeddings {asked} goes with --values: the tables are rounded where the weights are"
        )
    grid, pruned = Grid.parse(asked), {w.source for w in job.weights}
    names = [job.skeleton.sources[f"{path}.weight"][0][0] for path in job.skeleton.tables]
    return {name: grid for name in names if name not in pruned}


def _solver(recipe: Recipe) -> Any:
    """The solver object that was given, or the named one with its ``--set`` options."""
    options = recipe.options_for("solver")
    if isinstance(recipe.solver, str):
        return chain.solver_of(recipe.solver, options)
    if options:
        raise UserError("set goes with a solver's name; give the options to the solver object itself")
    return recipe.solver


def _own(recipe: Recipe) -> tuple[Reconstruction | None, Sampling | None]:
    """What has options of its own, where it is asked for."""
    epochs = {"epochs": recipe.reconstruct} if recipe.reconstruct else None
    written: dict[str, Any] | None = {} if SELF in parse_sources(recipe.calibration) else None
    return (
        recipe.own("reconstruct", Reconstruction, "--reconstruct EPOCHS", epochs),
        recipe.own("self", Sampling, "--calibration self", written),
    )


def with_defaults(recipe: Recipe, config: Any) -> Recipe:
    """Fill in the sample count and length, and refuse windows longer than the model takes."""
    little = recipe.calibration in ("builtin", SELF)
    samples = recipe.samples or (64 if little else 128)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = recipe.sequence_length or min(512 if little else 2048, limit or 2048)
    check_length(length, config)
    return replace(recipe, samples=samples, sequence_length=length)


def check_length(length: int, config: Any) -> None:
    """Refuse windows longer than the model takes."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise UserError(
            f"--sequence-length {length} is more than the model's max_position_embeddings, {limit}"
        )


def plan(model: str | Path, *, recipe: Any = None, **options: Any) -> dict[str, Any]:
    """What ``prune`` would do with the same options: weights, patterns, coverage, bytes, memory and time.

    Reads config and file headers, and the calibration text; no weights. Bytes and seconds are plain numbers;
    the time is an estimate from a short measurement of this machine's matrix products.

    Raises:
        UserError: whatever ``prune`` would refuse before it loads a weight.
    """
    job = prepare(model, Recipe.of(recipe, options), headers_only=True)
    text = job.calibrate(Unwritten(job.sampling) if job.sampling else None)
    r = job.recipe
    written = ", sampled from the model" if job.sampling else ""
    size = sum(job.checkpoint.bytes(name) for name in job.checkpoint.names())
    left_out = uncounted(job, written=text is not None and bool(written))
    return {
        "model": str(model),
        "architecture": job.skeleton.config.model_type,
        "solver": str(r.solver),
        "values": r.values and str(r.values),
        "calibration": f"{r.calibration}, {r.samples} x {r.sequence_length}{written}"
        if text
        else "none (data-free solver)",
        "tokens_sha256": text.sha256 if text and not written else None,
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
        "write_bytes": size
        + sum(
            dtype.itemsize * math.prod(shape)
            for tensors, _ in job.beside().values()
            for dtype, shape in tensors.values()
        ),
        **peaks(job),
        "seconds_estimate": seconds(job),
        "warnings": [
            *(
                []
                if r.allocate == "uniform"
                else [f"patterns are what was asked for; {r.allocate} will divide them"]
            ),
            *([f"the expected time leaves out {', '.join(left_out)}"] if left_out else []),
            *(f"{name} is left as it is: no linear weight" for name in job.skeleton.unrecognised),
        ],
    }


plan.__signature__ = with_options(plan)  # type: ignore[attr-defined]
