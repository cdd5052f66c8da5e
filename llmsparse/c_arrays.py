"""Tensors as C arrays: the text of them, and the bytes that they take on a device."""

from typing import TextIO

import torch
from torch import Tensor

from llmsparse.errors import UserError

WORDS = 5  # a line of 64-bit words
PIECE = WORDS * 8 * 20_000  # bytes that are text at once


class Arrays:
    """Writes constant arrays one after another and sums up their bytes.

    Bytes are written as 64-bit words in hexadecimal, 2.4 characters a byte: the shortest text that C99 allows of any
    length, and an eighth of the work that a compiler has with single bytes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bytes = 0

    def of_bytes(self, name: str, tensor: Tensor) -> str:
        """The bytes of ``tensor``, in little-endian words, filled up with zeros; returns ``name``."""
        data = tensor.contiguous().view(torch.uint8).flatten()
        count = max(-(-len(data) // 8), 1)  # C has no empty arrays
        padded = torch.zeros(8 * count, dtype=torch.uint8)
        padded[: len(data)] = data
        words = padded.view(-1, 8).flip(1)
        self.stream.write(f"static const uint64_t {name}[{count}] = {{\n")
        for piece in words.flatten().split(PIECE):
            text = piece.numpy().tobytes().hex(",", 8).replace(",", ",0x")
            self.stream.write(_lines("0x" + text))
        self.stream.write("};\n")
        self.bytes += 8 * count
        return name

    def of_scales(self, name: str, scales: Tensor) -> str:
        """bf16 numbers as their 16 bits; returns ``name``."""
        numbers = scales.contiguous().view(torch.int16).flatten().tolist()
        return self._numbers(name, "uint16_t", [f"{number & 0xFFFF}" for number in numbers], 2)

    def of_floats(self, name: str, tensor: Tensor) -> str:
        """float32 numbers, in decimals that give their bits back; returns ``name``.

        Raises:
            UserError: one is not finite.
        """
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"{name} of the model holds a number that is not finite; the checkpoint is damaged"
            )
        return self._numbers(name, "float", [_decimal(x) for x in tensor.float().flatten().tolist()], 4)

    def of_tokens(self, name: str, tokens: list[int]) -> str:
        return self._numbers(name, "int32_t", list(map(str, tokens)), 4)

    def _numbers(self, name: str, kind: str, numbers: list[str], width: int) -> str:
        self.stream.write(f"static const {kind} {name}[{len(numbers)}] = {{\n")
        for first in range(0, len(numbers), 16):
            self.stream.write(",".join(numbers[first : first + 16]) + ",\n")
        self.stream.write("};\n")
        self.bytes += width * len(numbers)
        return name


def _lines(text: str) -> str:
    """Words of 18 characters and a comma, broken into lines."""
    length = WORDS * 19
    return "".join(text[i : i + length].rstrip(",") + ",\n" for i in range(0, len(text), length))


def _decimal(number: float) -> str:
    text = f"{number:.9g}"
    return f"{text}f" if set(text) & {".", "e"} else f"{text}.0f"
