"""Running sums over calibration inputs: what a solver knows of the data."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llmsparse.errors import SolverError

PANEL = 128  # rows of the Gram updated together; only the upper triangle is multiplied
ESCALATION = (1.0, 3.0, 10.0, 30.0, 100.0)  # factors of the damping asked for, tried in turn


class Statistics(Protocol):
    """A sum over tokens that can be updated, merged across processes, and read as a mean."""

    tokens: int

    @classmethod
    def zeros(cls, in_features: int, device: torch.device | str = "cpu") -> Any: ...

    def update(self, inputs: Tensor, targets: Tensor | None = None) -> None: ...

    def merge(self, other: Any) -> None: ...

    def sums(self) -> Tensor: ...


class Factor(NamedTuple):
    """``upper`` (in, in) with upper.T @ upper = (G + damping * mean(diag G) * I)^-1; ``dead`` (in,) inputs never seen."""

    upper: Tensor
    damping: float
    dead: Tensor


class Damped(NamedTuple):
    """``matrix`` (in, in) with damping * mean(diag G) on its diagonal; ``dead`` (in,) inputs have ones there besides."""

    matrix: Tensor
    damping: float
    dead: Tensor


class Gram:
    """Sum of x xT over tokens (in, in), kept in float32 (float64 for float64 inputs); half of the layer's Hessian.

    The first token of each update counts ``first_token`` times.
    """

    def __init__(self, total: Tensor, tokens: int = 0, first_token: float = 1.0) -> None:
        self.total = total  # (in, in), only the upper panels are current until it is read
        self.tokens = tokens
        self.first_token = first_token
        self.cross: Tensor | None = (
            None  # (in, in), sum of d xT with d the input of the dense model, where it is known
        )
        self._known: dict[Any, Any] = {}  # made of the sum as it is

    @classmethod
    def zeros(
        cls, in_features: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Gram":
        return cls(torch.zeros(in_features, in_features, device=device, dtype=dtype))

    def update(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add the tokens of ``inputs`` (..., in); all must be real tokens, never padding.

        ``targets`` (..., in): what these inputs are in the dense model.
        """
        rows = self._rows(inputs)
        if targets is not None:
            if self.cross is None:
                self.cross = torch.zeros_like(self.total)
            self.cross.addmm_(self._rows(targets).T, rows)
        for start in range(0, self.total.shape[0], PANEL):
            panel = self.total[start : start + PANEL, start:]
            torch.addmm(panel, rows[:, start : start + PANEL].T, rows[:, start:], out=panel)
        self.tokens += rows.shape[0]
        self._known.clear()

    def _rows(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.total)
        if self.first_token != 1 and len(rows):
            rows = torch.cat((rows[:1] * self.first_token**0.5, rows[1:]))
        return rows

    def merge(self, other: "Gram") -> None:
        self.total += other.total
        if other.cross is not None:
            self.cross = other.cross.clone() if self.cross is None else self.cross.add_(other.cross)
        self.tokens += other.tokens
        self._known.clear()

    def sums(self) -> Tensor:
        """The running sum itself, for an all-reduce."""
        return self.total

    @property
    def squares(self) -> "SquaredNorm":
        """The diagonal alone; below zero where rounding put it, it is zero."""
        return SquaredNorm(self.total.diagonal().clamp(min=0.0), self.tokens)

    def damped(self, damping: float) -> "Damped":
        """The matrix as ``factor`` inverts it, not to be changed, and the damping that this took."""
        return self.remember(("damped", damping), lambda: self._damped(damping))

    def _damped(self, damping: float) -> "Damped":
        _, used, dead = self.factor(damping)
        matrix = self.matrix.clone()
        scale = matrix.diagonal().mean()
        matrix.diagonal()[dead] = 1.0
        matrix.diagonal().add_(used * scale)
        return Damped(matrix, used, dead)

    @property
    def matrix(self) -> Tensor:
        """The mean of x xT, (in, in), symmetric; remembered until the next update."""
        return self.remember("matrix", self._mean)

    def _mean(self) -> Tensor:
        mean = self.total / max(self.tokens, 1)
        for start in range(0, mean.shape[0], PANEL):  # panel by panel: no third matrix of this size
            end = start + PANEL
            square = mean[start:end, start:end]
            square.copy_(square.triu() + square.triu(1).T)
            mean[end:, start:end] = mean[start:end, end:].T
        return mean

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` makes of the sum, made once until the next update: the weights that share a Gram share it."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def factor(self, damping: float) -> Factor:
        """The upper Cholesky factor of the inverse of the damped Gram, remembered per damping.

        Damping escalates by ``ESCALATION`` (float32, then float64) until the factor exists; dead inputs
        get a unit diagonal. Source: SparseGPT, arXiv 2301.00774, section 3.

        Raises:
            SolverError: no damping makes the matrix positive definite (non-finite inputs).
        """
        return self.remember(("factor", damping), lambda: _factor(self.matrix, damping))


class FirstTokens(NamedTuple):
    """Makes Grams in which the first token of each window, updated window by window, counts ``times`` times.

    Attention sends much of its weight to the first token (arXiv 2309.17453), whose value is near zero: an error there
    reaches every other token. One of 512 tokens, it would hardly count.
    """

    times: float

    def zeros(self, in_features: int, device: torch.device | str = "cpu") -> Gram:
        return Gram(torch.zeros(in_features, in_features, device=device), first_token=self.times)


def _factor(matrix: Tensor, damping: float) -> Factor:
    if not bool(torch.isfinite(matrix.diagonal()).all()):  # it bounds the others
        raise SolverError(
            "the calibration inputs of this layer are not finite; use --dtype float32 or other data"
        )
    dead = matrix.diagonal() == 0
    scale = matrix.diagonal().mean()
    if scale == 0:
        raise SolverError(
            "the calibration inputs of this layer are all zero; it cannot be solved, leave it out with --skip"
        )
    for dtype in (matrix.dtype, torch.float64):
        for step in ESCALATION:
            upper = _inverse_factor(matrix.to(dtype), dead, float(damping * step * scale))
            if upper is not None:
                return Factor(upper.to(matrix.dtype), damping * step, dead)
    raise SolverError(
        f"the Gram of this layer stayed indefinite up to damping {damping * ESCALATION[-1]:g}; use more calibration text"
    )


def _inverse_factor(matrix: Tensor, dead: Tensor, damping: float) -> Tensor | None:
    """U with UT U = A^-1 for A = ``matrix``, ones at the ``dead`` inputs' diagonal, ``damping`` added to all of it.

    One Cholesky and one triangular inverse; None when A is not positive definite. With J the exchange matrix,
    J A J = L LT gives A^-1 = (J L^-T J)(J L^-1 J), and J L^-1 J is upper triangular.
    """
    flipped = matrix.flip(0, 1)
    flipped.diagonal()[dead.flip(0)] = 1.0
    flipped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(flipped)
    del flipped
    if int(info) != 0:
        return None
    inverse = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)  # in place
    del lower
    upper = inverse.flip(0, 1).contiguous()
    return upper if bool(torch.isfinite(upper).all()) else None


class SquaredNorm:
    """Sum of squares of each input over tokens, (in,), float32: the diagonal of the Gram."""

    def __init__(self, total: Tensor, tokens: int = 0) -> None:
        self.total = total
        self.tokens = tokens

    @classmethod
    def zeros(cls, in_features: int, device: torch.device | str = "cpu") -> "SquaredNorm":
        return cls(torch.zeros(in_features, device=device))

    def update(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add the tokens of ``inputs`` (..., in); all must be real tokens, never padding. ``targets`` are not used."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.total)
        self.total += rows.square().sum(0)
        self.tokens += rows.shape[0]

    def merge(self, other: "SquaredNorm") -> None:
        self.total += other.total
        self.tokens += other.tokens

    def sums(self) -> Tensor:
        """The running sum itself, for an all-reduce."""
        return self.total

    @property
    def value(self) -> Tensor:
        """The mean square of each input, (in,)."""
        return self.total / max(self.tokens, 1)


def narrowed(statistics: Gram, kind: type[Statistics] | None) -> Any:
    """What a solver that asks for ``kind`` needs to know, out of a Gram."""
    if kind is SquaredNorm:
        return statistics.squares
    return None if kind is None else statistics
