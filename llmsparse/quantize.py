"""Quantise a checkpoint, dense or sparse, with the sweep that prunes: what sparse values are compared with."""

from pathlib import Path
from typing import Any

from llmsparse.prune import prune
from llmsparse.recipe import Recipe, with_options

OWN = ("pattern", "scope", "allocate", "budget", "permute")  # of prune; a weight keeps the zeros that it has


def quantize(
    model: str | Path, out: str | Path, *, values: str | None = None, recipe: Any = None, resume: bool = False,
    overwrite: bool = False, progress: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Round the weights of ``model`` to ``values`` (int8, int4:32, int4:64; default: the recipe's, else int8) into ``out``.

    ``prune`` with pattern ``as-is``: a weight that is pruned (a fifth of it zero, or more) keeps its zeros, any other
    is rounded whole. With the default solver each column's rounding error is absorbed by later ones (GPTQ, arXiv
    2210.17323); ``solver="magnitude"`` rounds to the nearest. Returns the report.

    Raises:
        UserError: as ``prune`` does.
    """
    recipe = Recipe.of(recipe, {})
    return prune(
        model, out, recipe=recipe, resume=resume, overwrite=overwrite, progress=progress,
        pattern="as-is", allocate="uniform", budget="parameters", permute=False,
        values=values or recipe.values or "int8", **options,
    )  # fmt: skip


quantize.__signature__ = with_options(quantize, (*OWN, "values"))  # type: ignore[attr-defined]
