"""Integer values: codes times scales, the scales fitted to the weights that are kept."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.errors import UserError

SMALLEST = 2.0**-24  # fp16's smallest number: every scale is a multiple of it
LARGEST = 65280.0  # the largest number with 8 significant bits that fp16 holds
STEPS = {  # largest weight over scale, to be tried
    3: (2.6, 3.0, 3.4, 3.8, 4.2, 4.6),
    4: (5.0, 5.75, 6.5, 7.0, 7.5, 8.0, 8.5, 9.25),
    8: (97.0, 105.0, 112.0, 118.0, 123.0, 127.0),
}


@dataclass(frozen=True)
class Grid:
    """Codes of ``bits`` bits with one scale for every ``group`` inputs of a row (``None``: for the whole row).

    int4 codes are -8..7, int8 codes -127..127; zero is always code 0. (int3, -4..3, is there to compare with: no
    format stores it.) Scales have 8 significant bits and are exact in fp16 and bf16, and codes are fitted to the
    rounded scales, so that a code means the same number in every runtime.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in STEPS:
            raise UserError(f"a grid of {self.bits} bits is unknown; use 4 or 8 (3 to compare)")
        if self.group is not None and (self.group < 8 or self.group % 8):
            raise UserError(f"a group of {self.group} inputs is no multiple of 8; use 32 or 64")
        if not self.symmetric:
            raise UserError("asymmetric grids are unknown: their zero is no code in every runtime")

    @classmethod
    def parse(cls, text: str) -> "Grid":
        """Read ``int8``, ``int4:32``, ``int4:64`` (and int3:32).

        Raises:
            UserError: it is none of them.
        """
        match = re.fullmatch(r"int(8)|int([34]):(\d+)", text.strip())
        if match is None:
            raise UserError(f"values {text!r} are unknown; use int8, int4:32 or int4:64")
        return cls(8) if match[1] else cls(int(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"int{self.bits}" + (f":{self.group}" if self.group else "")

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return (-127, 127) if self.bits == 8 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    @property
    def tried(self) -> tuple[float, ...]:
        """The first scales of a fit, as largest weight over scale; int4's may be negative: -8 is the code farther out."""
        signs = (1.0,) if self.bits == 8 else (1.0, -1.0)
        return tuple(sign * step for step in STEPS[self.bits] for sign in signs)

    def groups(self, inputs: int) -> int:
        """Scales of a row of ``inputs`` weights."""
        return -(-inputs // self.group) if self.group else 1

    def fit(self, weight: Tensor, mask: Tensor | None = None, importance: Tensor | None = None) -> Tensor:
        """Scales (out, groups) for ``weight`` (out, in): least squares over the weights that ``mask`` keeps.

        ``importance`` (in,) weighs the squared errors. Several first scales are tried for each group; each is fitted
        to the codes that it gives, and the best is kept.
        """
        kept = weight if mask is None else weight.where(mask, weight.new_zeros(()))
        grouped = self._grouped(kept)  # (out, groups, group)
        weighing = None if importance is None else self._grouped(importance[None].to(weight))
        extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
        best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
        for step in self.tried:
            scale = self._refined(grouped, _eight_bits(extreme / step), weighing)
            wrong = self._codes(grouped, scale[..., None]).mul_(scale[..., None]).sub_(grouped).square_()
            error = (wrong if weighing is None else wrong * weighing).sum(-1)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best

    def unfitted(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales that hold the largest weight of each group: quick, for what is timed and not judged."""
        scales = _eight_bits(self._grouped(weight).abs().amax(-1) / self.range[1])
        return self.codes(weight, scales), scales

    def _refined(self, grouped: Tensor, scale: Tensor, weighing: Tensor | None) -> Tensor:
        """The least-squares scale for the codes that ``scale`` gives, (out, groups)."""
        codes = self._codes(grouped, scale[..., None])
        weighed = codes if weighing is None else codes * weighing
        fitted = (grouped * weighed).sum(-1) / (codes * weighed).sum(-1)
        return _eight_bits(torch.where(fitted.isfinite(), fitted, scale))

    def codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The nearest codes, int8 (out, in)."""
        return self._codes(weight, self.spread(scales, weight.shape[1])).to(torch.int8)

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Code times scale, float32 (out, in), exact; code 0 gives +0.0."""
        return codes.float() * self.spread(scales.float(), codes.shape[1]) + 0.0

    def nearest(self, weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes and scales of the nearest grid point to the kept part of ``weight`` (out, in)."""
        scales = self.fit(weight, mask)
        codes = self.codes(weight, scales)
        return (codes if mask is None else codes.masked_fill(~mask, 0)), scales

    def spread(self, scales: Tensor, inputs: int) -> Tensor:
        """The scale of every weight: (out, groups) -> (out, in) or (out, 1)."""
        return scales.repeat_interleave(min(self.group, inputs), 1)[:, :inputs] if self.group else scales

    def _codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        divisor = scale.masked_fill(scale == 0, torch.inf)  # a group of zeros has no scale
        return (weight / divisor).round_().clamp_(*self.range)

    def _grouped(self, rows: Tensor) -> Tensor:
        """(rows, in) -> (rows, groups, group), the last group filled up with zeros."""
        group = min(self.group or rows.shape[1], rows.shape[1])
        missing = -rows.shape[1] % group
        return torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, group))


def _eight_bits(scale: Tensor) -> Tensor:
    """The nearest number with 8 significant bits that fp16 and bf16 both hold exactly."""
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp((mantissa * 256).round(), exponent - 8)
    rounded = torch.where(rounded.abs() < 256 * SMALLEST, (scale / SMALLEST).round() * SMALLEST, rounded)
    return rounded.clamp(-LARGEST, LARGEST)
