"""A GGUF file in real llama.cpp (the package xllamacpp), in a process of its own: its crash is then one line."""

import json
import time
from importlib import util
from pathlib import Path
from typing import Any

from llmsparse import runtime_child
from llmsparse.runtime_child import DECODED, RUNS

INSTALL = "pip install 'llmsparse[gguf-check]'"
LISTED = 1000  # likeliest tokens whose log-probabilities are asked for


def available() -> bool:
    return util.find_spec("xllamacpp") is not None


def run(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp answers to ``request``: see ``answer``.

    Raises:
        UserError: llama.cpp cannot load the file, or ended without an answer.
    """
    return runtime_child.run(__name__, "llama.cpp", file, request)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load ``file`` with one thread, then with two: only their speed is asked, since beside other work they wait.

    ``ids``: teacher-forced tokens; position k's log-probability of ``ids[k]`` after ``ids[:k]``, for k of
    ``positions`` until ``enough`` were found. ``prompt``: ids to continue greedily for ``count`` tokens. ``text``: to
    be tokenised.
    Returns ``logprobs`` and ``likeliest`` (None where llama.cpp named no token) of the first positions, ``beyond``
    (targets outside the list), ``greedy``, ``text_tokens``, ``load_seconds``, ``tokens_per_second`` by threads.
    """
    begun = time.perf_counter()
    server = _server(request, 1)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - begun}
    found |= _forced(server, request["ids"], request["positions"], request["enough"])
    found["greedy"] = _greedy(server, request["prompt"], request["count"])
    found["text_tokens"] = _ask(server, prompt=request["text"], max_tokens=1)["usage"]["prompt_tokens"]
    speeds = {1: _speed(server, request["prompt"])}
    del server
    speeds[2] = _speed(_server(request, 2), request["prompt"])
    return found | {"tokens_per_second": speeds}


def _forced(server: Any, ids: list[int], positions: list[int], enough: int) -> dict[str, Any]:
    logprobs: list[float | None] = []
    likeliest: list[int | None] = []
    beyond = 0
    for k in positions:
        row = _likeliest(server, ids[:k], LISTED)
        logprobs.append(None if row is None else row.get(ids[k]))
        likeliest.append(None if row is None else next(iter(row)))
        beyond += row is not None and ids[k] not in row
        if len(logprobs) - logprobs.count(None) == enough:
            break
    return {"logprobs": logprobs, "likeliest": likeliest, "beyond": beyond}


def _server(request: dict[str, Any], threads: int) -> Any:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = request["file"]
    options.n_ctx = request["context"]
    options.n_parallel = 1
    options.n_gpu_layers = 0
    options.swa_full = True  # else a sliding cache forgets the prefix, and every position reads it all again
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(options)


def _ask(server: Any, **request: Any) -> dict[str, Any]:
    found = server.handle_completions({"temperature": 0, "cache_prompt": True, **request})
    if "usage" not in found:
        raise RuntimeError(f"error: llama.cpp answered {json.dumps(found)[:300]}")
    return found


def _likeliest(server: Any, ids: list[int], count: int) -> dict[int, float] | None:
    """Token -> log-probability of the ``count`` likeliest, in order; None where the first is half a character.

    llama.cpp leaves such a token out of its answer.
    """
    found = _ask(server, prompt=ids, max_tokens=1, logprobs=count)["choices"][0]["logprobs"]
    if not found or not found["content"]:
        return None
    return {row["id"]: row["logprob"] for row in found["content"][0]["top_logprobs"]}


def _greedy(server: Any, prompt: list[int], count: int) -> list[int]:
    """Ends early at half a character."""
    written: list[int] = []
    while len(written) < count and (row := _likeliest(server, prompt + written, 1)) is not None:
        written.append(next(iter(row)))
    return written


def _speed(server: Any, prompt: list[int]) -> float:
    _ask(server, prompt=prompt, max_tokens=8, ignore_eos=True)  # the first tokens fill caches
    runs = [_ask(server, prompt=prompt, max_tokens=DECODED, ignore_eos=True) for _ in range(RUNS)]
    return max(float(found["timings"]["predicted_per_second"]) for found in runs)


if __name__ == "__main__":
    runtime_child.serve(answer)
