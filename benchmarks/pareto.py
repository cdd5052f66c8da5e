"""What a model's bytes buy: perplexity and LAMBADA against packed bytes, and tokens a second; one-shot and recovered.

    python -m benchmarks.pareto ["NAME=FOLDER"] [--forms bf16 Q4_0 50%+int8] [--tokens 0.25M] [--plot pareto.svg]

A form is bf16 (the model as it is), Q8_0 or Q4_0 (a GGUF file that ggml rounds), or PATTERN+VALUES: pruned by --solver,
tables in int8, and then again, trained on --tokens through the same grid. Quality rows are those of ``benchmarks.recover``;
one that is there is not measured again. With --threads, all forms are then decoded in turn, round after round, in one
process: the model itself in transformers, packed forms by llmsparse's CPU kernels, GGUF files by llama.cpp (package
xllamacpp).
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import llmsparse
from benchmarks import recover, rows
from benchmarks.cpu_decode import PROMPT, seconds_a_token
from benchmarks.llama_cpp import LlamaCpp
from llmsparse import gguf_check
from llmsparse.checkpoint import Checkpoint
from llmsparse.eval.models import load_model, weight_bytes
from llmsparse.export import export
from llmsparse.figures import with_error

DENSE, FILES = "bf16", ("Q8_0", "Q4_0")
SWEPT = tuple(f"{pattern}+int4:32" for pattern in ("as-is", "50%", "2:4", "width:25%"))
FORMS = [DENSE, *FILES, SWEPT[0], "50%+int8", *SWEPT[1:]]
WHOLE = ("as-is", "width", "depth")  # patterns without zeros: the sweep rounds them
LAMBADA = "lambada_openai"


def main() -> None:
    asking = recover.parser(__doc__)
    asking.add_argument("--forms", nargs="+", default=FORMS)
    asking.add_argument(
        "--solver", default=recover.BEST, help="of forms with zeros; others take sparsegpt's sweep"
    )
    asking.add_argument("--tokens", default="0.25M", help="that pruned forms are trained on (0: none)")
    asking.add_argument(
        "--threads", nargs="*", type=int, default=[], help="decode with so many (default: not)"
    )
    asking.add_argument("--decoded", type=int, default=64, help="tokens of a decoding")
    asking.add_argument("--rounds", type=int, default=5)
    asking.add_argument("--speeds", type=Path, default=rows.RESULTS / "pareto.json")
    asking.add_argument("--plot", type=Path, help="a file for the plot, SVG or PNG")
    options = recover.parsed(asking)
    if unknown := [f for f in options.forms if f not in (DENSE, *FILES) and f.count("+") != 1]:
        asking.error(f"form {unknown[0]} is none; use {', '.join(FORMS)}, or another PATTERN+VALUES")
    options.tasks = [LAMBADA]
    name, folder = recover.source_of(options)
    found = {form: _quality(name, folder, form, options) for form in options.forms}
    for threads in options.threads:
        for form, speed in _speeds(name, folder, threads, options).items():
            identity = {"model": name, "form": form, "threads": threads, "tokens": options.decoded}
            rows.append(options.speeds, {**rows.provenance(), **identity, "rounds": options.rounds, **speed})
    print(table(name, found, rows.read(options.speeds)))
    if options.plot:
        _plot(name, found, options.plot)


def _quality(name: str, folder: Path, form: str, options: Any) -> list[dict[str, Any]]:
    """The row of a form, and that of the form recovered, where it is one that can be."""
    if form in (DENSE, *FILES):
        solver = "dense" if form == DENSE else form
        wanted = recover.wanted(name, folder, solver, "", "0", options)
        if form == DENSE:
            return [
                {
                    **recover.row_of(folder, wanted, options),
                    "packed_bytes": weight_bytes(Checkpoint.open(folder)),
                }
            ]
        row = recover.find(rows.read(options.results), wanted, options.tasks)
        return [row or _of_file(folder, wanted, form, options)]
    counts = dict.fromkeys(["0", options.tokens])
    return [recover.row_of(folder, _wanted(name, folder, form, count, options), options) for count in counts]


def _wanted(name: str, folder: Path, form: str, tokens: str, options: Any) -> dict[str, Any]:
    pattern, values = form.split("+")
    solver = "sparsegpt" if pattern.startswith(WHOLE) else options.solver
    return recover.wanted(name, folder, f"{solver}+values={values}", pattern, tokens, options)


def _of_file(folder: Path, wanted: dict[str, Any], form: str, options: Any) -> dict[str, Any]:
    """A row of the GGUF file's own tensors, put into transformers in float32; its bytes are without the vocabulary's."""
    import gguf

    file, checkpoint = _gguf(folder, form, options), Checkpoint.open(folder)
    size = {"packed_bytes": sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)}
    with tempfile.TemporaryDirectory(prefix="llmsparse-bench-") as place:
        model = load_model(checkpoint, torch.float32, torch.device("cpu"), False)
        gguf_check.fill(model, checkpoint, file)
        checkpoint.tokenizer().save_pretrained(place)
        model.save_pretrained(place)
        row = {**wanted, **recover.judged(Path(place), options), **size, **rows.provenance()}
    rows.append(options.results, row)
    return row


def _gguf(folder: Path, form: str, options: Any) -> Path:
    """A GGUF file that ggml rounds, or that has a pruned folder's own codes; made now if it is not there."""
    given = {"values": form.lower()} if form in FILES else {}
    out = (
        Path(options.keep, f"{folder.name}-{form}-gguf") if given else folder.with_name(f"{folder.name}-gguf")
    )
    if not out.exists():
        export(folder, out, format="gguf", **given)
    return next(out.glob("*.gguf"))


def _speeds(name: str, folder: Path, threads: int, options: Any) -> dict[str, dict[str, Any]]:
    """Tokens a second of every form as it came from one shot, by all that decode it, in turn."""
    torch.set_num_threads(threads)
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    for form in options.forms:
        if form == DENSE:
            runs[form, "transformers"] = _decoder(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), folder, options.decoded
            )
            continue
        place = folder
        if form not in FILES:
            place, _ = recover.made(folder, _wanted(name, folder, form, "0", options), options)
            model = llmsparse.load(recover.packed(place), dtype=torch.bfloat16)
            runs[form, "llmsparse"] = _decoder(model, place, options.decoded)
        server = LlamaCpp(_gguf(place, form, options), threads)
        runs[form, "llama_cpp"] = lambda server=server: server.tokens_per_second(PROMPT, options.decoded)  # type: ignore[misc]
    rates = [{key: run() for key, run in runs.items()} for _ in range(options.rounds + 1)][1:]
    found: dict[str, dict[str, Any]] = {}
    for form, runtime in runs:
        found.setdefault(form, {})[runtime] = _spread([turn[form, runtime] for turn in rates])
    return found


def _decoder(model: Any, folder: Path, tokens: int) -> Callable[[], float]:
    ids = Checkpoint.open(folder).tokenizer()(PROMPT, return_tensors="pt").input_ids
    return lambda: 1 / seconds_a_token(model, ids, tokens)


def _spread(rates: list[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def table(name: str, found: dict[str, list[dict[str, Any]]], speeds: list[dict[str, Any]]) -> str:
    """Markdown: a line for each form, one-shot and recovered; speeds are medians, lowest and highest."""
    texts = [
        Path(text["data"]).parent.name or text["data"] for text in next(iter(found.values()))[0]["texts"]
    ]
    heads = ["form", "trained on", "MB", *texts, "LAMBADA"]
    timed = {(s["form"], s["threads"]): s for s in speeds if s["model"] == name}
    counts = sorted({threads for _, threads in timed})
    heads += [f"tokens/s, {threads} threads" for threads in counts]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for form, each in found.items():
        for row in each:
            scores = [with_error(text["perplexity"], text["standard_error"]) for text in row["texts"]]
            task = next(task for task in row["tasks"] if task["task"] == LAMBADA)
            cells = [form, f"{row['tokens']:,}" if row["tokens"] else "", f"{row['packed_bytes'] / 1e6:.1f}"]
            cells += [*scores, with_error(task["value"], task["standard_error"], 100)]
            cells += [_rates(timed.get((form, threads))) for threads in counts]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rates(row: dict[str, Any] | None) -> str:
    runtimes = [r for r in ("transformers", "llmsparse", "llama_cpp") if row and r in row]
    shown = [
        "{median:.1f} ({lowest:.1f} to {highest:.1f})".format(**row[r]) + f" {r}" for r in runtimes if row
    ]
    return ", ".join(shown).replace("llama_cpp", "llama.cpp")


def _plot(name: str, found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Perplexity on the first text, and LAMBADA, against bytes; an arrow from one shot to recovered."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(name, fontsize=10)
    kinds: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("perplexity", lambda row: float(row["texts"][0]["perplexity"])),
        ("LAMBADA, %", lambda row: 100 * next(t["value"] for t in row["tasks"] if t["task"] == LAMBADA)),
    ]
    for axes, (kind, value) in zip(figure.subplots(1, 2), kinds, strict=True):
        for form, each in found.items():
            places = [(row["packed_bytes"] / 1e6, value(row)) for row in each]
            colour = f"C{list(found).index(form) % 10}"
            axes.plot(*places[0], "o", color=colour, mfc="white" if places[1:] else colour)
            for place in places[1:]:
                axes.annotate("", place, places[0], arrowprops={"arrowstyle": "->", "color": colour})
                axes.plot(*place, "o", color=colour)
            axes.annotate(
                form, places[-1], (0, 6), textcoords="offset points", fontsize=7, ha="center", color=colour
            )
        axes.margins(0.15)
        axes.set(xlabel="MB of weights, packed", ylabel=kind, xscale="log")
        axes.set_xticks(ticks := [60, 80, 100, 140, 200, 280], ticks)
        axes.minorticks_off()
    figure.axes[0].set_yscale("log")
    figure.savefig(file)


if __name__ == "__main__":
    main()
