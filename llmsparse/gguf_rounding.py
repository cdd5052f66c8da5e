"""ggml's own rounding of weights that have no codes: Q8_0 and Q4_0 by the package gguf, Q4_K and Q6_K by libgguf."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsparse import bits, extras, gguf_blocks
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.extras import Extra
from llmsparse.gguf_layout import Place
from llmsparse.gridfile import NAME
from llmsparse.values import KNOWN

EXTRA = Extra("gguf-k", {"libgguf": "0.2"})  # Q4_K and Q6_K alone
TYPES = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K", "q6_k": "Q6_K"}  # as the options name them -> ggml's
K_BLOCK = 256  # inputs of a block in the K types


@dataclass(frozen=True)
class Rounding:
    """Which types ggml rounds to; None where floats or codes are written."""

    linear: str | None = None
    tables: str | None = None

    @classmethod
    def asked(cls, checkpoint: Checkpoint, values: str | None, embeddings: str | None) -> "Rounding":
        """Of ``--values`` and ``--embeddings``; without the second, tables follow the weights, as Q8_0.

        Raises:
            UserError: no such type, codes beside the model that would be rounded again, no libgguf for a K type.
        """
        found = cls(_type("values", values), _type("embeddings", embeddings))
        if found.linear and embeddings is None:
            found = cls(found.linear, "Q8_0")
        if (found.linear or found.tables) and (checkpoint.folder / NAME).is_file():
            option = f"--values {values}" if found.linear else f"--embeddings {embeddings}"
            raise UserError(
                f"{option} was asked for, but {NAME} beside the model has codes, which {option.split()[1]} would round "
                f"again; leave {option.split()[0]} out to export these, or delete {NAME} to round the weights anew"
            )
        for option, kind in (
            (f"--values {values}", found.linear),
            (f"--embeddings {embeddings}", found.tables),
        ):
            if kind and kind.endswith("K"):
                extras.require(option, EXTRA, EXTRA.packages)
        return found

    def left(self, values: str | None, embeddings: str | None) -> tuple[str | None, str | None]:
        """What of ``values`` and ``embeddings`` ggml does not round."""
        return None if self.linear else values, None if self.tables else embeddings

    def of(self, place: Place, inputs: int) -> str | None:
        """The type of a matrix with rows of ``inputs``; UserError where a K type cannot hold them."""
        kind = self.tables if place.table or place.head else self.linear
        if kind and kind.endswith("K") and inputs % K_BLOCK:
            option = "--embeddings" if place.table or place.head else "--values"
            raise UserError(
                f"{kind} has blocks of {K_BLOCK} inputs, and {place.source} has rows of {inputs}, no multiple of it; "
                f"use {option} int4:32, int8, q4_0 or q8_0, whose blocks have {gguf_blocks.BLOCK}"
            )
        return kind

    def describe(self) -> dict[str, Any]:
        """What ``Numbers.describe`` does not know."""
        names = {kind: name for name, kind in TYPES.items()}
        found: dict[str, Any] = {"kinds": [names[self.linear]]} if self.linear else {}
        return found | ({"embeddings": names[self.tables]} if self.tables else {})

    def warnings(self) -> list[str]:
        found = []
        if self.linear:
            found.append(
                f"{self.linear} values are what ggml rounds each weight to, alone; codes of `llmsparse prune --values` or "
                "`llmsparse quantize --values`, which calibrate, lose less"
            )
        if self.linear == "Q4_K":
            found.append(
                "Q4_K has a minimum for every block: pruned weights do not stay zero; int4:32, int8, q4_0, q8_0 and q6_k "
                "keep them"
            )
        return found


def _type(option: str, name: str | None) -> str | None:
    if name is None or not name.startswith("q"):
        return None
    if name not in TYPES:
        raise UserError(f"{option} {name!r} are unknown; known: {KNOWN}, and of ggml {', '.join(TYPES)}")
    return TYPES[name]


def encode(kind: str, weight: Tensor, name: str) -> Iterator[np.ndarray]:
    """uint8 (out, row bytes) of the weight (out, in), a panel of rows at a time.

    Raises:
        UserError: a number that is not finite or beyond fp16's range, in which blocks have their scales.
    """
    rows, inputs = weight.shape
    for first, last in bits.panels(rows, inputs):
        panel = weight[first:last].float()
        if not bool(panel.to(torch.float16).isfinite().all()):
            raise UserError(
                f"{name} holds values that are not finite, or beyond fp16's range; repair the model"
            )
        yield _rounded(kind, panel.numpy())


def _rounded(kind: str, panel: np.ndarray) -> np.ndarray:
    import gguf

    type = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("K"):
        return gguf.quants.quantize(panel, type)
    import libgguf

    return libgguf.quantize_rows(panel, int(type))
