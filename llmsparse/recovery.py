"""The options of a recovery: their defaults, help and checks, and how many steps they make."""

import re
from dataclasses import dataclass, fields
from typing import Any

from llmsparse.errors import UserError
from llmsparse.recipe import option

TRAINED = ("linears", "linears+norms", "lora")
MASKS = ("fixed", "splice")
OPTIMIZERS = ("adamw", "adamw8bit")
MASTERS = ("float32", "bfloat16")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
MOST = 1e15  # tokens, more than there are
FREE = ("token", "cache_dir")  # a run that differs in these alone may be continued


@dataclass(frozen=True)
class Recovery:
    """Every option of ``recover``; ``None`` means the default that its help states."""

    teacher: str | None = option(
        None, "the dense model, a hub id or a folder (default: the one that SPARSE's report names)"
    )
    data: str = option(
        "builtin",
        "the text, as --calibration of prune takes it: builtin, files, hub datasets, mixtures, or self (the "
        "teacher writes it)",
    )
    tokens: str = option("0.5M", "how many are trained on, e.g. 98k or 2M; a shorter text is read again")
    lr: float = option(
        2e-4, "the largest learning rate; it rises over the first steps, then falls by a cosine"
    )
    train: str = option(
        "linears+norms", "linears, linears+norms, or lora: low-rank updates, merged under the masks"
    )
    rank: int = option(32, "of lora's updates")
    masks: str = option(
        "fixed", "fixed, or splice: a dense shadow is trained, and the masks are chosen again from it"
    )
    splice_every: int = option(16, "steps between two choices of the masks")
    splice_until: float = option(0.5, "the share of the steps after which the masks stay")
    values: str | None = option(
        None,
        "int8, int4:32 or int4:64: train what these grids leave of the weights (default: SPARSE's own, if any)",
    )
    hidden: float = option(0.0, "weight of the blocks' outputs in the loss, beside the logits (0: none)")
    top_k: int = option(
        0,
        "keep so many of the teacher's likeliest tokens on disk, so that it reads a window once (0: it runs along)",
    )
    batch: int = option(4, "windows a step")
    batch_size: str = option(
        "auto",
        "of them in a forward pass: a number, or auto, all of them; fewer take less memory and more time",
    )
    sequence_length: int = option(512, "tokens a window")
    evaluations: int = option(
        10, "how often the held-out text is looked at, and the run can be continued from"
    )
    optimizer: str = option("adamw", "adamw, or adamw8bit: torchao's, a quarter of the states' memory")
    master: str = option(
        "float32", "of the trained weights: float32, or bfloat16 (rounded stochastically, with adamw8bit)"
    )
    checkpointing: bool = option(
        False, "compute activations again instead of keeping them: less memory, more time"
    )
    seed: int = option(0, "of the choice of text, and of the order of windows")
    device: str = option("auto", "auto, cpu, cuda, cuda:1...")
    dtype: str = option("auto", "of matrix products: auto, float32, bfloat16 or float16")
    token: str | None = option(None, "hub token (default: the one you are logged in with)")
    cache_dir: str | None = option(None, "where hub downloads are kept")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoints")

    def __post_init__(self) -> None:
        for name, known in (
            ("train", TRAINED), ("masks", MASKS), ("optimizer", OPTIMIZERS), ("master", MASTERS)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)} is unknown; use {', '.join(known)}")
        object.__setattr__(self, "batch_size", str(self.batch_size))
        if self.batch_size != "auto" and not re.fullmatch(r"[1-9]\d*", self.batch_size):
            raise UserError(f"--batch-size {self.batch_size} must be auto or a number of at least 1")
        for name in ("rank", "splice_every", "batch", "evaluations"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.sequence_length < 2:
            raise UserError(f"--sequence-length {self.sequence_length} must be at least 2")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"--lr {self.lr} must be above 0; its default is 2e-4")
        if not 0 < self.splice_until <= 1:
            raise UserError(
                f"--splice-until {self.splice_until} must be a share of the steps, above 0 and at most 1"
            )
        for name in ("hidden", "top_k"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more")
        if self.train == "lora" and self.masks == "splice":
            raise UserError(
                "--masks splice trains every weight of a shadow, --train lora few numbers; give one of them"
            )
        if self.hidden and self.top_k:
            raise UserError(
                "--hidden needs the teacher's blocks, of which --top-k keeps nothing; give one of them"
            )
        if self.master == "bfloat16" and self.optimizer != "adamw8bit":
            raise UserError("--master bfloat16 goes with --optimizer adamw8bit, which rounds stochastically")
        count_of(self.tokens)
        if self.masks == "splice" and self.splice_last <= self.splice_every:
            raise UserError(
                f"--masks splice: {self.steps} steps choose no mask again before they stay after {self.splice_last}; "
                "use more --tokens, or a smaller --splice-every or --batch"
            )

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Recovery":
        """Raises UserError on an option that is none."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise UserError(f"option {unknown[0]!r} is unknown; known: {', '.join(known)}")
        return cls(**options)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the token."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "token"}

    @property
    def steps(self) -> int:
        """Steps of ``batch`` windows that reach ``tokens``."""
        return -(-count_of(self.tokens) // (self.batch * self.sequence_length))

    @property
    def splice_last(self) -> int:
        """The last step before which masks may be chosen again."""
        return max(1, round(self.splice_until * self.steps))

    @property
    def in_a_pass(self) -> int:
        """Windows in a forward pass."""
        return self.batch if self.batch_size == "auto" else int(self.batch_size)

    @property
    def windows(self) -> int:
        """Windows that ``tokens`` are, read once."""
        return -(-count_of(self.tokens) // self.sequence_length)


def count_of(text: Any) -> int:
    """``98k``, ``0.5M``, ``1e6`` or ``2,000`` as a number.

    Raises:
        UserError: it is none, or below 1.
    """
    match = re.fullmatch(r"(\d*\.?\d+(?:e\d+)?)([kmb]?)", str(text).replace(",", "").strip().lower())
    exact = float(match[1]) * UNITS[match[2]] if match else 0.0
    found = round(exact) if exact < MOST else 0
    if found < 1:
        raise UserError(f"--tokens {text} is no number of tokens; use e.g. 98k or 0.5M")
    return found
