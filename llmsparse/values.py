"""The kinds of stored numbers: bits of floats, or codes with scales; and the weights that they stand for."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.errors import UserError

FLOATS = {  # name -> the weight's dtype, the dtype of its bits as an integer
    "bf16": (torch.bfloat16, torch.int16),
    "fp16": (torch.float16, torch.int16),
    "fp32": (torch.float32, torch.int32),
}
KNOWN = "bf16, fp16, fp32, int8, int4:G (G inputs a scale, as in int4:32)"


@dataclass(frozen=True)
class Values:
    """One kind of stored numbers; a number whose bits are all zero is the weight 0."""

    name: str
    bits: int  # of a stored number
    float_dtype: torch.dtype | None = None  # None: codes
    group: int | None = None  # inputs a scale; None: the whole row

    @classmethod
    def parse(cls, text: str) -> "Values":
        """``bf16``, ``int8``, ``int4:32``... Raises UserError on anything else."""
        if text in FLOATS:
            dtype, _ = FLOATS[text]
            return cls(text, dtype.itemsize * 8, dtype)
        if text == "int8":
            return cls(text, 8)
        match = re.fullmatch(r"int4:([1-9][0-9]{0,6})", text)
        if match is None:
            raise UserError(f"values {text!r} are unknown; known: {KNOWN}")
        return cls(text, 4, None, int(match[1]))

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Values | None":
        """The kind that stores weights of ``dtype`` bit for bit, if there is one."""
        name = next((name for name, (stored, _) in FLOATS.items() if stored == dtype), None)
        return None if name is None else cls.parse(name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that holds the stored numbers."""
        return FLOATS[self.name][1] if self.float_dtype else {8: torch.int8, 4: torch.uint8}[self.bits]

    def groups(self, columns: int) -> int:
        """Scales a row; 0 for floats."""
        if self.float_dtype is not None:
            return 0
        return 1 if self.group is None else -(-columns // self.group)

    def numbers(self, weight: Tensor) -> Tensor:
        """The bits of ``weight`` as integers, for the kinds of floats."""
        return weight.to(self.float_dtype).contiguous().view(self.dtype)

    def weight(self, numbers: Tensor, scales: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """The weights (rows, in) of their numbers; float32 for codes unless ``dtype`` says otherwise."""
        if self.float_dtype is not None:
            return numbers.view(self.float_dtype).to(dtype or self.float_dtype)
        assert scales is not None  # (rows, groups)
        each = scales.float()
        if self.group is not None:
            group = min(self.group, numbers.shape[1])  # a hostile file may name any
            each = each.repeat_interleave(group, 1)[:, : numbers.shape[1]]
        return (numbers.float() * each).add_(0.0).to(dtype or torch.float32)  # + 0.0: no zero is negative
