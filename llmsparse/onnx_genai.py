"""An ONNX folder in real onnxruntime-genai, in a process of its own, without torch."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmsparse import runtime_child
from llmsparse.runtime_child import THREADS, rate

CHUNK = 128  # tokens whose logits are in memory at once


def run(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai answers to ``request``: see ``answer``.

    Raises:
        UserError: it cannot load the folder, or ended without an answer.
    """
    return runtime_child.run(__name__, "onnxruntime-genai", folder, request)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load the folder ``file`` with one thread, then with two.

    ``ids``, ``first``: windows; predictions before position ``first`` do not count. ``prompt``: ids to continue
    greedily for ``count`` tokens. Returns ``losses`` (nats, summed, of each window), ``greedy``, ``load_seconds``,
    ``tokens_per_second`` by threads.
    """
    prompt, speeds, loading = request["prompt"], {}, []
    for threads in THREADS:
        begun = time.perf_counter()
        model = _model(request["file"], threads)
        loading.append(time.perf_counter() - begun)
        speeds[threads] = rate(partial(_decode, model, prompt))
    windows = zip(request["ids"], request["first"], strict=True)
    return {
        "losses": [_loss(model, ids, first) for ids, first in windows],
        "greedy": _greedy(model, prompt, request["count"]),
        "load_seconds": loading[0],
        "tokens_per_second": speeds,
    }


def _model(folder: str, threads: int) -> Any:
    import onnxruntime_genai as og

    config = og.Config(folder)
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def _generator(model: Any, length: int) -> Any:
    """At most ``length`` tokens, of which each is the likeliest; an end-of-text token does not end it."""
    import onnxruntime_genai as og

    options = og.GeneratorParams(model)
    options.set_search_options(max_length=length, min_length=length, do_sample=False)
    return og.Generator(model, options)


def _loss(model: Any, ids: list[int], first: int) -> float:
    """Of the predictions from position ``first`` on."""
    generator, total = _generator(model, len(ids)), 0.0
    for start in range(0, len(ids) - 1, CHUNK):
        piece = ids[start : min(start + CHUNK, len(ids) - 1)]
        generator.append_tokens(np.array(piece, np.int32))
        skipped = max(first - start, 0)
        if skipped < len(piece):
            logits = generator.get_output("logits")[0][skipped:]
            total += runtime_child.loss(logits, ids[start + 1 + skipped : start + 1 + len(piece)])
    return total


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, by the logits alone: whatever the folder says of sampling."""
    generator, written = _generator(model, len(prompt) + count + 1), list(prompt)
    fed = 0
    while len(written) < len(prompt) + count:
        generator.append_tokens(np.array(written[fed:], np.int32))
        fed = len(written)
        written.append(int(np.argmax(generator.get_output("logits")[0][-1])))
    return written[len(prompt) :]


def _decode(model: Any, prompt: list[int], count: int) -> float:
    """Seconds of ``count`` tokens after the prompt."""
    generator = _generator(model, len(prompt) + count + 1)
    generator.append_tokens(np.array(prompt, np.int32))
    begun = time.perf_counter()
    for _ in range(count):
        generator.generate_next_token()
    return time.perf_counter() - begun


if __name__ == "__main__":
    runtime_child.serve(answer)
