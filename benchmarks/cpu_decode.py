"""Tokens a second on a CPU, end to end: packed models beside dense ones in transformers, and llama.cpp.

    python -m benchmarks.cpu_decode [NAME=FOLDER ...] [--random] [--gguf FILE] [--threads 1 2] [--keep FOLDER]

For each checkpoint named: the dense one in bf16, and packed forms of it, 50 % zeros by magnitude (the values are
timed, not judged). ``--random`` does the same to a random llama of 1B shapes (16 blocks, 2048 wide, 8192 inside,
vocabulary 32,000). All forms are loaded in one process and continue the same prompt in turn, round after round; greedy.
"without products" runs the packed model's loop with products that do nothing: what Python and everything else takes.
``--gguf``: llama.cpp (package xllamacpp) on this file's F16, Q8_0 and Q4_0 forms.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import llmsparse
from benchmarks import models, rows
from benchmarks.llama_cpp import LlamaCpp, requantised
from benchmarks.memory import save_random
from llmsparse.checkpoint import Checkpoint
from llmsparse.eval.models import weight_bytes
from llmsparse.sparse_linear import SparseLinear

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
PROMPT = "The history of the steam engine begins"
FORMS = {  # name -> options of prune and of export; None: the checkpoint itself
    "dense bf16": None,
    "50 % bf16": {"pattern": "50%"},
    "50 % int8": {"pattern": "50%", "values": "int8"},
    "50 % int4:32": {"pattern": "50%", "values": "int4:32"},
    "dense int8": {"pattern": "as-is", "values": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, required=True, help="a folder for the packed models")
    parser.add_argument("--results", default=rows.RESULTS / "cpu_decode.json")
    options = parser.parse_args()
    cases = list(map(models.named, options.models))
    if options.random:
        folder = options.keep / "random-1b"
        if not folder.exists():
            save_random(SHAPE, 16, folder)
        cases.append(("random llama of 1B shapes", folder))
    measured = []
    for name, folder in cases:
        measured += _case(name, folder, options)
    if options.gguf:
        measured += _llama(options)
    for row in measured:
        rows.append(Path(options.results), {**rows.provenance(), **row})
    print(table(measured))


def _case(name: str, folder: Path, options: Any) -> Iterator[dict[str, Any]]:
    places = {form: _packed(folder, form, options.keep) for form in FORMS}
    loaded = {form: llmsparse.load(place, dtype=torch.bfloat16) for form, place in places.items()}
    tokenizer = Checkpoint.open(folder).tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    runs: dict[str, Callable[[], float]] = {
        form: lambda model=model: seconds_a_token(model, ids, options.tokens)
        for form, model in loaded.items()
    }
    runs["50 % int8 without products"] = lambda: _without_products(loaded["50 % int8"], ids, options.tokens)
    before = torch.get_num_threads()
    for threads in options.threads:
        torch.set_num_threads(threads)
        times = _rounds(runs, options.rounds)
        for form, found in times.items():
            size = weight_bytes(Checkpoint.open(places[form])) if form in places else None
            yield _row(name, form, threads, [1 / t for t in found], size, options)
    torch.set_num_threads(before)


def _packed(folder: Path, form: str, keep: Path) -> Path:
    """The packed folder of one form of a checkpoint, made by magnitude: no data is needed."""
    if (asked := FORMS[form]) is None:
        return folder
    stem = f"{folder.name}-{form.replace(' ', '').replace('%', 'pc').replace(':', 'of')}"
    sparse, packed = keep / f"{stem}-sparse", keep / f"{stem}-packed"
    if not packed.exists():
        llmsparse.prune(folder, sparse, solver="magnitude", overwrite=True, **asked)
        llmsparse.export(sparse, packed)
        shutil.rmtree(sparse)
    return packed


def seconds_a_token(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """The median gap between greedy tokens after the first."""
    times: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is held back."""

    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, temperature=None, top_p=None, top_k=None, streamer=Clock(),
            pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
    gaps = [
        after - before for before, after in zip(times[1:], times[2:], strict=False)
    ]  # times[0]: the prompt
    return statistics.median(gaps)


def _without_products(model: Any, ids: torch.Tensor, tokens: int) -> float:
    with _silenced():
        return seconds_a_token(model, ids, tokens)


@contextmanager
def _silenced() -> Iterator[None]:
    real = SparseLinear.forward
    SparseLinear.forward = lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features)  # type: ignore[method-assign]
    try:
        yield
    finally:
        SparseLinear.forward = real  # type: ignore[method-assign]


def _rounds(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every run in turn, ``rounds`` times after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            found = run()
            if number:
                times[name].append(found)
    return times


def _llama(options: Any) -> Iterator[dict[str, Any]]:
    for threads in options.threads:
        for kind in ("F16", "Q8_0", "Q4_0"):
            file = requantised(options.gguf, kind, options.keep / f"{options.gguf.stem}.{kind}.gguf")
            server = LlamaCpp(file, threads)
            found = [server.tokens_per_second(PROMPT, options.tokens) for _ in range(options.rounds + 1)][1:]
            yield _row(f"llama.cpp, {options.gguf.name}", kind, threads, found, file.stat().st_size, options)


def _row(
    name: str, form: str, threads: int, rates: list[float], size: int | None, options: Any
) -> dict[str, Any]:
    return {
        "case": name, "form": form, "threads": threads, "tokens": options.tokens, "rounds": len(rates),
        "tokens_per_second": round(statistics.median(rates), 2), "lowest": round(min(rates), 2),
        "highest": round(max(rates), 2), "weight_bytes": size,
    }  # fmt: skip


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown: median tokens a second of the rounds, lowest and highest, and the ratio to dense bf16."""
    lines = ["| model | form | weight file | threads | tokens/s | to dense bf16 |", "|" + "---|" * 6]
    base = {
        (r["case"], r["threads"]): r["tokens_per_second"]
        for r in measured
        if r["form"] in ("dense bf16", "F16")
    }
    for row in measured:
        size = f"{row['weight_bytes'] / 1e6:.1f} MB" if row["weight_bytes"] else ""
        ratio = row["tokens_per_second"] / base[row["case"], row["threads"]]
        rate = f"{row['tokens_per_second']:.1f} ({row['lowest']:.1f} to {row['highest']:.1f})"
        lines.append(f"| {row['case']} | {row['form']} | {size} | {row['threads']} | {rate} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
