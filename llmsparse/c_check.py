"""What a c-header export is worth: its C compiled for this machine, beside the source in transformers."""

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llmsparse import export_check
from llmsparse.c_program import Program
from llmsparse.checkpoint import Checkpoint
from llmsparse.eval.models import load_model
from llmsparse.eval.windows import Windows
from llmsparse.exporters.c_header import LINEAR, longest_text
from llmsparse.figures import byte_size
from llmsparse.runtime_child import DECODED, rate

TOKENS = 2048  # scalar C takes minutes for more
PROMPT, GREEDY = 32, 32  # tokens of the continued text, and of its continuation
GAIN = "zeros are neither stored nor multiplied where a bitmask is stored; bytes are of the constants"


def check(
    checkpoint: Checkpoint, out: Path, result: dict[str, Any], *, trust_remote_code: bool, progress: Any
) -> dict[str, Any]:
    """Perplexity, weights and speed of the compiled C; perplexity and greedy tokens of transformers beside it.

    One float32 model is in memory, after the compiler: first the source's weights, then those of the C in their place.
    """
    config, tokenizer = checkpoint.config(trust_remote_code), checkpoint.tokenizer(trust_remote_code)
    text = export_check.fixed_text(tokenizer, longest_text(config), TOKENS)
    context = text.windows.ids.shape[1]
    with tempfile.TemporaryDirectory() as work:
        progress.start("compiling", 1)
        program = Program.build(out, context, Path(work))
        progress.advance("compiling", f"{program.seconds:.0f} s")
        exported = export_check.told(_losses(program, text.windows, progress), text.windows)
        prompt = text.windows.ids[0][: max(1, min(PROMPT, context - DECODED))].tolist()
        runtime = _runtime(program, prompt, context)
        theirs = [int(token) for token in program.ask("greedy", min(GREEDY, context - len(prompt)), prompt)]
        model = load_model(checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
        source, _ = export_check.score(model, text.windows, "perplexity of the source", progress)
        zeros = _fill(model, program)
        found = export_check.summary(
            text, result, source=source, exported=exported, zeros=zeros, files=[program.file], gain=GAIN,
            runtime=runtime,
        )  # fmt: skip
    same = export_check.equal(export_check.greedy(model, prompt, len(theirs)), theirs)
    notes = [
        f"greedy continuation equals transformers' with the same weights for {same} of {len(theirs)} tokens",
        f"compiled in {program.seconds:.0f} s; model.h is {byte_size((out / 'model.h').stat().st_size)} of text",
    ]
    return found | {
        "file_bytes": result["device"]["flash_bytes"],  # the program has its own code besides
        "compile_seconds": program.seconds,
        "greedy": {"tokens": len(theirs), "equal": same},
        "notes": notes,
    }


def _losses(program: Program, windows: Windows, progress: Any) -> list[float]:
    """Of each window; a process for each, as many at once as there are processors."""
    progress.start("perplexity of the C", len(windows.ids))
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        firsts, ids = windows.first.tolist(), windows.ids.tolist()
        for (loss,) in pool.map(lambda first, window: program.ask("loss", first, window), firsts, ids):
            found.append(float(loss))
            progress.advance("perplexity of the C", "")
    return found


def _runtime(program: Program, prompt: list[int], context: int) -> dict[str, Any]:
    """It has one thread; a context with no room for the timed tokens gives no speed."""
    begun = time.perf_counter()
    program.ask("greedy", 0)
    seconds = time.perf_counter() - begun
    room = context >= len(prompt) + DECODED
    speed = rate(lambda count: float(program.ask("seconds", count, prompt)[0])) if room else None
    return {
        "name": program.name,
        "load_seconds": seconds,
        "tokens_per_second": {} if speed is None else {"1": speed},
    }


@torch.no_grad()
def _fill(model: Any, program: Program) -> dict[str, float | None]:
    """Put the C's matrices in the place of the model's, and count the zeros of the linear weights."""
    zeros, places = export_check.Zeros(), list(_places(model))
    stored = program.weights((weight.shape[0], weight.shape[1]) for _, weight in places)
    for (linear, weight), found in zip(places, stored, strict=True):
        if linear:
            zeros.add(weight, found)
        weight.copy_(found)
    return zeros.shares()


def _places(model: Any) -> Iterator[tuple[bool, torch.Tensor]]:
    """The model's matrices in the order of the C's; whether each is a linear layer's."""
    for i in range(model.config.num_hidden_layers):
        for end in LINEAR.values():
            yield True, model.get_submodule(f"model.layers.{i}.{end}").weight
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    yield False, table
    if head is not table:
        yield False, head
