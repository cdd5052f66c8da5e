"""The options of a pruning run: their defaults, help and file form."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llmsparse.errors import UserError
from llmsparse.recipe_file import read

OFFLOADS = ("cpu", "disk", "none")
TARGETS = ("pruned", "dense")
ORDERS = ("sequential", "together")
BUDGETS = ("parameters", "bytes", "time")
OWN = (
    "reconstruct",
    "allocate",
    "width",
    "depth",
    "self",
)  # whose options --set takes as NAME.KEY, beside the solver's


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options: its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Every option of ``prune`` and ``plan``; ``None`` means the default that its help states."""

    solver: Any | None = option(
        None,
        "pruning method, see `llmsparse list solvers`; refit:wanda is refit around wanda (default: alps, with --values "
        "sparsegpt)",
    )
    pattern: tuple[Any, ...] = option(
        ("50%",),
        "50%, or n:m with n KEPT of m, or as-is; REGEX=PATTERN for some weights; width:25% or depth:2 first makes the "
        "model itself smaller (repeatable)",
    )
    scope: str | None = option(None, "where 50% is counted: row or layer (default: the solver's own)")
    allocate: Any = option(
        "uniform",
        "how the patterns' sparsity is divided among the weights that share one, see `llmsparse list allocators`",
    )
    budget: str = option(
        "parameters",
        "what the division leaves as it is: parameters, packed bytes, or decode time here (time)",
    )
    calibration: str = option(
        "builtin",
        "builtin, self (the model writes it), a .txt/.jsonl/.parquet file or folder, a hub dataset id[:config][:split], "
        "or a=0.5,b=0.5",
    )
    samples: int | None = option(None, "calibration windows (default 128; builtin, self 64)")
    sequence_length: int | None = option(
        None, "tokens a window (default 2048; builtin, self 512; at most what the model takes)"
    )
    values: str | None = option(  # or a Grid
        None, "int8, int4:32 or int4:64: round inside the solver (default: values stay floating-point)"
    )
    embeddings: str | None = option(
        None,
        "the same for embedding and output tables; keep leaves them (default: int8 with --values, else keep)",
    )
    targets: str = option(
        "pruned",
        "what a block is to reproduce: its dense outputs on the pruned model's inputs, or the dense model's (dense)",
    )
    order: str = option(
        "sequential", "of the weights of a block: each on what those before it produce, or all together"
    )
    reconstruct: int = option(
        0, "epochs of training each block's kept weights on the calibration text, after the solver"
    )
    compensate: int = option(
        0, "rank of an adapter beside OUT (PEFT's LoRA) that takes most of each weight's error; 0 for none"
    )
    permute: bool = option(
        False,
        "first put channels into an order in which an n:m pattern keeps more; what the model computes stays",
    )
    seed: int = option(0, "seed of the choice of calibration text")
    device: str = option("auto", "auto, cpu, cuda, cuda:1...")
    set: tuple[str, ...] = option(
        (), "a solver's option, e.g. damping=0.02; reconstruct.KEY=, allocate.KEY= for those (repeatable)"
    )
    skip: tuple[str, ...] = option((), "regular expression of weights to leave dense (repeatable)")
    include: tuple[str, ...] = option(
        (), "regular expression of weights to prune besides the blocks', e.g. lm_head (repeatable)"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    token: str | None = option(None, "hub token (default: the one you are logged in with)")
    cache_dir: str | None = option(None, "where hub downloads are kept")
    dtype: str = option("auto", "of forward passes: auto, float32, bfloat16 or float16")
    batch_size: str = option("auto", "windows a forward pass: auto, or a number; halved when memory runs out")
    offload: str = option("cpu", "where hidden states wait: cpu, disk or none (stay on the device)")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")

    def __post_init__(self) -> None:
        for name in ("pattern", "set", "skip", "include"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, tuple | list) else (value,))
        object.__setattr__(self, "batch_size", str(self.batch_size))
        for name in ("samples", "sequence_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name, known in (
            ("offload", OFFLOADS),
            ("targets", TARGETS),
            ("order", ORDERS),
            ("budget", BUDGETS),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)} is unknown; use {', '.join(known)}")
        if self.compensate < 0:
            raise UserError(f"--compensate {self.compensate} must be a rank, or 0 for none")
        if self.reconstruct < 0:
            raise UserError(f"--reconstruct {self.reconstruct} must be a number of epochs, or 0 for none")
        if self.batch_size != "auto" and not re.fullmatch(r"[1-9]\d*", self.batch_size):
            raise UserError(f"--batch-size {self.batch_size} must be auto or a number of at least 1")
        for name in ("skip", "include"):
            for expression in getattr(self, name):
                _check_regex(f"--{name}", expression)

    @classmethod
    def of(cls, recipe: "Recipe | str | Path | None", options: dict[str, Any]) -> "Recipe":
        """A recipe (object, YAML file, a run's folder or report.json, or none) with ``options`` laid over it."""
        base = recipe if isinstance(recipe, Recipe) else cls(**read(recipe, _kinds())) if recipe else cls()
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UserError(f"option {unknown[0]!r} is unknown; known: {', '.join(known)}")
        return replace(base, **options)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the token, for the report and for YAML."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "token"}
        values = {k: [str(item) for item in v] if isinstance(v, tuple) else v for k, v in values.items()}
        solver = None if self.solver is None else str(self.solver)
        plugged = {"solver": solver, "allocate": str(self.allocate)}
        return {**values, **plugged, "values": self.values and str(self.values)}

    def options_for(self, owner: str) -> dict[str, Any]:
        """The ``--set`` pairs of one owner, numbers as numbers: one of ``OWN``, or ``solver`` with all the others."""
        import yaml

        pairs = {}
        for text in self.set:
            key, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--set {text} is not KEY=VALUE, e.g. --set damping=0.02")
            whose, _, name = key.strip().rpartition(".")
            if whose == owner or (owner == "solver" and whose not in OWN):
                pairs[key.strip() if owner == "solver" else name] = yaml.safe_load(value)
        return pairs

    def own(self, owner: str, kind: Any, asked_by: str, given: dict[str, Any] | None) -> Any:
        """``kind`` of the options ``given`` and the ``--set`` pairs of ``owner``; None, where ``given`` is: not asked for.

        Raises:
            UserError: pairs without what they belong to (``asked_by``), an unknown option, a value that is refused.
        """
        options = self.options_for(owner)
        if given is None:
            if options:
                raise UserError(f"--set {owner}.{next(iter(options))} goes with {asked_by}")
            return None
        known = [f.name for f in fields(kind) if f.name not in given]
        if unknown := sorted(set(options) - set(known)):
            raise UserError(f"--set {owner}.{unknown[0]}: there is no such option; known: {', '.join(known)}")
        try:
            return kind(**given, **options)
        except TypeError as error:
            raise UserError(f"--set {owner}...: {error}") from error


def with_options(
    function: Callable[..., Any], without: tuple[str, ...] = (), kind: type | None = None
) -> inspect.Signature:
    """The signature of ``function`` with its ``**options`` spelled out as the fields of ``kind``, else of ``Recipe``."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(kind or Recipe)
        if f.name not in without
    ]
    return inspect.Signature([*own, *options], return_annotation=dict[str, Any])


def show(source: str | Path) -> str:
    """Every option of a recipe file, or of a run, as YAML that ``--recipe`` takes."""
    import yaml

    values = Recipe.of(source, {}).as_dict()
    return yaml.safe_dump({k.replace("_", "-"): v for k, v in values.items()}, sort_keys=False)


def recipe(action: str, source: str | Path, *, write: Callable[[str], None] | None = None) -> dict[str, Any]:
    """``action`` "show": every option of the recipe ``source``, a file or a run's folder, as YAML.

    ``write`` is given the YAML. Returns ``recipe``, the options. Raises UserError: another action, a bad recipe.
    """
    if action != "show":
        raise UserError(f"recipe {action} is unknown; known: show")
    if write is not None:
        write(show(source))
    return {"recipe": Recipe.of(source, {}).as_dict()}


def _kinds() -> dict[str, str]:
    return {f.name: str(f.type) for f in fields(Recipe)}


def _check_regex(option: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(f"{option} {expression!r} is not a regular expression: {error}") from error
