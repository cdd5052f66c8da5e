"""One evaluation: perplexity, zero-shot tasks and generation of a model, alone or against its dense parent."""

import contextlib
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmsparse.atomic import check_place, write_whole
from llmsparse.checkpoint import Checkpoint
from llmsparse.device import forward_dtype, pick_device
from llmsparse.errors import UserError
from llmsparse.eval import models as load
from llmsparse.eval.ability import beside, capabilities, lost_most
from llmsparse.eval.fidelity import DENSE_NLL, NLL, fidelity, window_scores
from llmsparse.eval.forward import forward_of
from llmsparse.eval.generation import continuations, prompts_of
from llmsparse.eval.nonfinite import refuse_nan
from llmsparse.eval.perplexity import perplexities, perplexity
from llmsparse.eval.tasksource import find_tasks, load_tasks
from llmsparse.eval.text import Source, load_sources
from llmsparse.eval.windows import Windows, bos_rule, cut_windows
from llmsparse.progress import Quiet
from llmsparse.report import finite, versions
from llmsparse.runs import KIND

TASK_TOKENS = 512  # of task items in a forward pass, times batch_size; on a CPU 2,048 were 10 % slower


def evaluate(
    model: str | Path,
    data: str | None = None,
    *,
    tasks: str | None = None,
    limit: int | None = None,
    task_data: str | Path | None = None,
    against: str | Path | None = None,
    context: int = 2048,
    stride: int | None = None,
    windows: int | None = None,
    generate: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 1,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: Any = None,
) -> dict[str, Any]:
    """What ``model`` is worth: on each text of ``data``, on each of ``tasks``, and beside ``against``.

    ``data``: texts separated by commas (default: wikitext2, or none where there are tasks), cut into windows of
    ``context`` tokens, the first ``windows`` (all) of them, ``stride`` tokens apart (default: no overlap).
    ``tasks``: zero-shot tasks separated by commas, their first ``limit`` items (all); see ``find_tasks``.
    ``against``: the dense model, which adds fidelity, flips and the ability kept. ``generate``: how many
    beginnings of the first text to continue. A forward pass reads ``batch_size`` windows, or 512 times as many
    tokens of task items.

    Returns ``sources`` (a row a text: perplexity per token, word and byte, standard errors; with ``against``
    kl in nats a token, top-1 and top-5 agreement, ``positions``), ``tasks``, ``capabilities``, ``lost_most``,
    ``generation``, and what they were measured with; also written to ``out`` as JSON. Everything that can be
    refused is refused before weights are loaded.

    Raises:
        UserError: no checkpoint, no text, text shorter than a window, a context beyond the model's
            positions, another vocabulary in ``against``, an unknown task, outputs that are NaN.
    """
    for name, value in (("windows", windows), ("batch-size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it starts at 1")
    if generate < 0:
        raise UserError(f"--generate {generate}: name how many texts to continue, or 0")
    check_place(out)
    where, progress = pick_device(device), progress or Quiet()
    checkpoints = [Checkpoint.open(model, revision, token, cache_dir)]
    if against is not None:
        checkpoints.append(Checkpoint.open(against, None, token, cache_dir))
    tokenizer = checkpoints[0].tokenizer(trust_remote_code)
    if against is not None:
        load.check_same_vocabulary(checkpoints[0], checkpoints[1], tokenizer, trust_remote_code)
    wanted = find_tasks(tasks, task_data) if tasks is not None else []
    texts = load_sources(data or (None if wanted and not generate else "wikitext2"), token, cache_dir)
    for checkpoint in checkpoints if texts else []:
        load.check_context(checkpoint, context, trust_remote_code)
    cut = [_cut(source, tokenizer, context, windows, stride) for source in texts]
    for each in cut:
        load.check_ids(checkpoints[0], each.ids, trust_remote_code)
    if wanted:
        load.check_embeddings(checkpoints[0], tokenizer, trust_remote_code)
    harness = load_tasks(wanted) if wanted else None
    used = forward_dtype(dtype, checkpoints[0].stored_dtype, where)
    names = [str(model)] if against is None else [str(model), str(against)]
    loaded = [load.load_model(checkpoint, used, where, trust_remote_code) for checkpoint in checkpoints]
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {
        "kind": KIND,
        **dict(zip(("model", "against"), names, strict=False)),
        **dict(zip(("model_bytes", "against_bytes"), map(load.weight_bytes, checkpoints), strict=False)),
        "context": context,
        "stride": stride,
        "bos": bos_rule(tokenizer),
        "dtype": str(used).removeprefix("torch."),
        "device": str(where),
        "versions": versions() | ({"lm_eval": version("lm_eval")} if wanted else {}),
        "seconds": seconds,
    }
    if texts:
        with _timed(seconds, "perplexity"):
            result["sources"] = [
                _perplexity(loaded, names, source, each, batch_size, progress)
                for source, each in zip(texts, cut, strict=True)
            ]
    if harness is not None:
        with _timed(seconds, "tasks"):
            result |= _tasks(loaded, names, tokenizer, harness, wanted, limit, batch_size, progress)
    if generate:
        with _timed(seconds, "generation"):
            result["generation"] = continuations(loaded, prompts_of(cut[0].ids, generate), tokenizer)
    if out is not None:
        write_whole(out, json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def _cut(source: Source, tokenizer: Any, context: int, windows: int | None, stride: int | None) -> Windows:
    try:
        return cut_windows(source.text, tokenizer, context, windows, stride)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error


@torch.inference_mode()
def _perplexity(
    models: list[Any], names: list[str], source: Source, windows: Windows, batch_size: int, progress: Any
) -> dict[str, Any]:
    """Run the windows through the model, and the dense one beside it, batch by batch."""
    ids = windows.ids.to(models[0].device)
    sparse, *dense = [forward_of(model, ids[:1]) for model in models]
    progress.start(source.name, len(ids))
    found: list[torch.Tensor] = []
    counts = windows.scored.sum(1)
    for batch, first in zip(ids.split(batch_size), windows.first.split(batch_size), strict=True):
        scores = window_scores(sparse, dense[0] if dense else None, batch, first)
        for model, name, kind in zip(models, names, (NLL, DENSE_NLL), strict=False):
            refuse_nan(scores[kind], model, batch, name)
        found.append(scores)
        done = torch.cat([part[NLL].sum(1) for part in found])
        detail = f"perplexity {perplexity(done, counts[: len(done)])[0]:.2f}"
        for _ in batch:
            progress.advance(source.name, detail)
    scores = torch.cat(found, dim=1)
    return {
        "name": source.name,
        "data": source.label,
        "sha256": source.sha256,
        **perplexities(scores[NLL], windows),
        "windows": len(ids),
        "logits": "by chunk" if sparse.chunked else "whole window",
        **(fidelity(scores, windows) if dense else {}),
    }


def _tasks(
    models: list[Any], names: list[str], tokenizer: Any, harness: Any, sources: list[Any],
    limit: int | None, batch_size: int, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """The tasks' rows, the dense model's figures in them, and what they say of capabilities."""
    from llmsparse.eval.harness import SharedPrefixLM
    from llmsparse.eval.zeroshot import zero_shot

    found = []
    for model, name in zip(models, names, strict=True):
        runner = SharedPrefixLM(
            model, tokenizer, batch_tokens=batch_size * TASK_TOKENS, name=name, progress=progress
        )
        found.append(zero_shot(runner, harness, sources, limit))
    rows = found[0] if len(found) == 1 else [beside(*pair) for pair in zip(*found, strict=True)]
    groups = capabilities(rows)
    return {
        "tasks": rows,
        "limit": limit,
        "shared_prefixes": runner.shares is True,
        "capabilities": groups,
        "lost_most": lost_most(groups),
    }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
