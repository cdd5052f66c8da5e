"""OWL: blocks with more outliers among |weight| x norm of the input are pruned less (Yin et al., arXiv 2310.05175)."""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from llmsparse.allocation import Divided, Levels, Memory, Target, check_positive, sparsity_of
from llmsparse.dense_model import DenseModel
from llmsparse.pattern import Pattern
from llmsparse.skeleton import Weight
from llmsparse.statistics import SquaredNorm

Place = int | None  # a block, or what lies outside all


@dataclass(frozen=True)
class Owl:
    """Options: a score above ``outlier`` times its weight's mean is an outlier; ``windows`` of the text are looked at.

    Sparsities differ by 2 x ``spread`` at most. The paper calls ``outlier`` M and ``spread`` lambda.
    """

    outlier: float = 5.0
    spread: float = 0.08
    windows: int = 16

    def __post_init__(self) -> None:
        check_positive("owl", self, "outlier", "spread", "windows")

    def __call__(self, dense: DenseModel, target: Target, memory: Memory) -> dict[str, Pattern]:
        """The nearest whole levels to what the share of outliers in each block asks for."""
        outliers: dict[str, int] = {}

        def visit(weight: Weight, matrix: Tensor, statistics: SquaredNorm | None) -> None:
            outliers[weight.name] = count(matrix, statistics, self.outlier)

        dense.observe(dict.fromkeys(target.weights, SquaredNorm), self.windows, visit)
        levels = target.levels()
        wanted: dict[str, float] = {}
        for pattern, names in target.groups.items():
            places = self._wanted([levels[name] for name in names], outliers, pattern)
            wanted |= {name: places[target.weights[name].block] for name in names}
        return target.chosen(levels, target.nearest(levels, wanted))

    def _wanted(self, levels: list[Levels], outliers: dict[str, int], pattern: Divided) -> dict[Place, float]:
        """The sparsity of each block: the mean's, less for more outliers."""
        sizes, found = Counter[Place](), Counter[Place]()
        for each in levels:
            sizes[each.weight.block] += each.unit * each.of
            found[each.weight.block] += outliers[each.weight.name]
        mean = sparsity_of(pattern)
        kept = spread({place: found[place] / sizes[place] for place in sizes}, sizes, self.spread)
        return {place: mean - more for place, more in kept.items()}


def count(matrix: Tensor, statistics: SquaredNorm | None, outlier: float) -> int:
    """How many of |w_ij| * ||x_j|| (out, in) lie above ``outlier`` times their mean; |w_ij| alone without statistics."""
    scores = matrix.abs()
    if statistics is not None and statistics.tokens:
        scores *= statistics.value.sqrt()
    return int((scores > outlier * scores.mean()).count_nonzero())


def spread(ratios: dict[Place, float], sizes: dict[Place, int], reach: float) -> dict[Place, float]:
    """``ratios`` stretched to [0, 2 x ``reach``], less their mean weighted by ``sizes``; zeros where all are equal."""
    least, most = min(ratios.values()), max(ratios.values())
    if least == most:
        return dict.fromkeys(ratios, 0.0)
    stretched = {place: (ratio - least) / (most - least) * 2 * reach for place, ratio in ratios.items()}
    mean = sum(stretched[place] * sizes[place] for place in sizes) / sum(sizes.values())
    return {place: value - mean for place, value in stretched.items()}


allocator = Owl
