"""How a recovery went: what training notes of it, and what a terminal shows."""

import math
import shlex
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from llmsparse.figures import byte_size, duration, plain
from llmsparse.render import table


@dataclass
class Course:
    """How far a run is: what it did, and what it found on the held-out text (``kl`` in nats a token)."""

    step: int = 0
    seconds: float = 0.0  # of training alone
    before: float = math.inf
    best: float = math.inf
    best_step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    diverged: str | None = None


def show(report: dict[str, Any]) -> RenderableType:
    """The losses, then what the run came to, and what to do next."""
    found = report["recovery"]
    few = found["options"]["top_k"]
    over = f" over its {few} likeliest tokens" if few else ""
    kl, windows, seconds = found["kl"], found["windows"], found["seconds"]
    rows = [
        (
            f"{row['tokens']:,}",
            "" if row["train"] is None else plain(row["train"]),
            plain(row["held_out"]),
            duration(row["seconds"]),
        )
        for row in found["curve"]
    ]
    lines = [
        f"held-out KL divergence from {found['teacher']}{over}: {plain(kl['before'])} nats a token before, "
        f"{plain(kl['after'])} after (step {kl['step']} of {found['steps']}, the best)",
        f"{found['tokens']:,} tokens, {found['epochs']:.3g} times {windows['trained']} windows; "
        f"{windows['held_out']} held out",
        f"{duration(sum(seconds.values()))} ({', '.join(f'{k} {duration(v)}' for k, v in seconds.items())}), "
        f"peak memory {byte_size(max(found['peak_memory'].values(), default=0))}",
        *(f"warning: {text}" for text in report.get("warnings", ())),
        f"written to {report['out']}; its report is {report['out']}/report.json",
        f"next: {shlex.join(['llmsparse', 'eval', report['out'], '--against', report['model']])}",
    ]
    return Group(table(("tokens >", "training >", "held out >", "time >"), rows), *map(Text, lines))
