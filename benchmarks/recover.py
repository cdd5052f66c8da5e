"""What training after pruning gives back: perplexity and zero-shot scores before and after, seconds, share of the machine.

    python -m benchmarks.recover ["NAME=FOLDER"] [--patterns 50% 2:4] [--tokens 0 0.25M 1M] [--options lr=2e-4]

Each model is pruned by --solver (as ``benchmarks.quality`` does), trained on --tokens of the text (0: not at all) and
evaluated on two texts that it was not trained on, and on zero-shot tasks. A row a model; one that is there is not measured
again, and a training that was cut off goes on.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks import models, rows
from benchmarks.prune_speed import matmul_gflops
from llmsparse.checkpoint import Checkpoint
from llmsparse.device import DTYPES, pick_device
from llmsparse.eval.evaluate import evaluate
from llmsparse.eval.models import weight_bytes
from llmsparse.export import export
from llmsparse.figures import with_error
from llmsparse.gguf_checkpoint import SMOLLM2_NAME, smollm2
from llmsparse.recover import recover
from llmsparse.recovery import Recovery, count_of
from llmsparse.skeleton import Skeleton

KEY = (
    *models.IDENTITY, "tokens", "options", "trained_on", "judged_on", "context", "windows_asked", "limit", "device", "dtype"
)  # fmt: skip
TEXTS = ("c4", "c4_exl3", "wikipedia", "iot_docs")  # below text/ of $LLMSPARSE_DATA, in equal parts
TASKS = ["lambada_openai", "arc_easy", "hellaswag", "winogrande", "copa"]
TRAINED, HELD, TEACHER = (
    6,
    4,
    2,
)  # operations a token and parameter: one pass forward is 2, its gradients 2 each
BEST = "alps+targets=dense+reconstruct=1"
KEPT = rows.ROOT / "build" / "recover"
FACTS = ("sha256", "perplexity", "standard_error", "tokens", "windows")


def main() -> None:
    asking = parser(__doc__)
    asking.add_argument("--solver", default=BEST)
    asking.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    asking.add_argument("--tokens", nargs="+", default=["0", "0.25M", "1M"])
    asking.add_argument("--tasks", nargs="*", default=TASKS)
    asking.add_argument("--show", action="store_true", help="measure nothing: print the rows that are there")
    options = parsed(asking)
    name, folder = source_of(options)
    cells = [wanted(name, folder, solver, *cell, options) for solver, *cell in _cells(options)]
    for cell in cells if not options.show else []:
        row_of(folder, cell, options)
    print(table(rows.read(options.results), cells, options))


def parser(told: str | None) -> argparse.ArgumentParser:
    """What every measurement of trained models asks for; ``told`` describes it."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, or NAME=FOLDER (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--keep", default=KEPT, help="a folder where the models stay (default build/recover)")
    parser.add_argument("--options", nargs="*", default=[], help="of recover, KEY=VALUE")
    parser.add_argument("--data", help="text to train on (default: four texts below $LLMSPARSE_DATA)")
    parser.add_argument(
        "--judged-on", nargs="+", help="texts (default: WikiText-2 and the English Web Treebank)"
    )
    parser.add_argument("--limit", type=int, default=500, help="first items of each task (default 500)")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of pruning and evaluation (default float32)")
    parser.add_argument("--results", type=Path, default=rows.RESULTS / "recover.json")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with the texts that are meant where none was named."""
    options = parser.parse_args()
    below = os.environ.get("LLMSPARSE_DATA", "")
    options.data = options.data or ",".join(f"{below}/text/{text}/calib.jsonl=0.25" for text in TEXTS)
    options.judged_on = options.judged_on or ["wikitext2", f"{below}/text/web_ewt/calib.jsonl"]
    return options


def source_of(options: Any) -> tuple[str, Path]:
    """The dense model's name and folder."""
    return models.named(options.model) if options.model else (SMOLLM2_NAME, smollm2())


def _cells(options: Any) -> list[tuple[str, str, str]]:
    """(solver, pattern, tokens): the dense model, then pattern by pattern."""
    each = [(options.solver, pattern, tokens) for pattern in options.patterns for tokens in options.tokens]
    return [("dense", "", "0"), *each]


def wanted(name: str, folder: Path, solver: str, pattern: str, tokens: str, options: Any) -> dict[str, Any]:
    """What identifies a row."""
    source = rows.calibration_text()
    trained = tokens != "0"
    return {
        **models.identity(name, folder, solver, pattern, source, options),
        "tokens": count_of(tokens) if trained else 0,
        "options": sorted(options.options) if trained else [],
        "trained_on": rows.public(options.data) if trained else None,
        "judged_on": list(map(rows.public, options.judged_on)),
        "context": options.context,
        "windows_asked": options.windows,
        "limit": options.limit,
        "device": pick_device(options.device).type,
        "dtype": options.dtype,
    }


def find(measured: list[dict[str, Any]], wanted: dict[str, Any], tasks: list[str]) -> dict[str, Any] | None:
    """The latest row that ``wanted`` identifies and that has these ``tasks``."""
    return next(
        (
            row
            for row in reversed(measured)
            if all(row.get(key) == wanted[key] for key in KEY)
            and set(tasks) <= {task["task"] for task in row["tasks"]}
        ),
        None,
    )


def row_of(folder: Path, wanted: dict[str, Any], options: Any) -> dict[str, Any]:
    """The row that is there, or a new one."""
    found = find(rows.read(options.results), wanted, options.tasks)
    if found is None:
        found = _measure(folder, wanted, options)
        rows.append(options.results, found)
    return found


def made(folder: Path, wanted: dict[str, Any], options: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of the model that ``wanted`` identifies, made now or found below --keep; facts of its making."""
    with models.pruned(folder, rows.calibration_text(), wanted, options) as (sparse, run):
        facts = {key: value for key, value in run.items() if key != "tokens_sha256"}
    if not wanted["tokens"]:
        return sparse, facts
    given = "".join("-" + option.replace("=", "") for option in wanted["options"])
    place = Path(f"{sparse}-{wanted['tokens']}{given}")
    return place, facts | _train(folder, sparse, place, wanted, options)


def _measure(folder: Path, wanted: dict[str, Any], options: Any) -> dict[str, Any]:
    place, facts = made(folder, wanted, options)
    models.say(wanted, f"{wanted['tokens']} tokens: evaluating")
    return {
        **wanted,
        **judged(place, options),
        "packed_bytes": weight_bytes(Checkpoint.open(packed(place))) if wanted["pattern"] else None,
        **facts,
        **rows.provenance(rows.calibration_text()),
    }


def judged(place: Path, options: Any) -> dict[str, Any]:
    """Perplexity and scores of the model in ``place``, as rows have them."""
    found = evaluate(
        place, ",".join(options.judged_on), tasks=",".join(options.tasks) or None, limit=options.limit,
        context=options.context, windows=options.windows, device=options.device, dtype=options.dtype,
    )  # fmt: skip
    return {
        "texts": [
            {"data": rows.public(data)} | {key: row[key] for key in FACTS}
            for data, row in zip(options.judged_on, found["sources"], strict=True)
        ],
        "tasks": found.get("tasks", []),
    }


def packed(place: Path) -> Path:
    """The packed folder beside ``place``, made now if it is not there."""
    out = place.with_name(f"{place.name}-packed")
    if not out.exists():
        export(place, out)
    return out


def _train(folder: Path, sparse: Path, out: Path, wanted: dict[str, Any], options: Any) -> dict[str, Any]:
    """Recover ``sparse`` into ``out``, or go on; the course, and the share of the machine's products that it reached."""
    given = {key: _typed(key, value) for key, value in (o.split("=", 1) for o in wanted["options"])}
    asked = Recovery.of({
        "teacher": str(folder), "data": options.data, "tokens": str(wanted["tokens"]), "device": options.device,
        "seed": options.seed, **given,
    })  # fmt: skip
    models.say(wanted, f"{wanted['tokens']} tokens: training")
    if (out / "report.json").exists():
        report = json.loads((out / "report.json").read_text())
        kept, same = report["recovery"]["options"], asked.as_dict().keys() - {"device", "dtype"}
        if any(kept[key] != getattr(asked, key) for key in same):
            raise SystemExit(f"error: {out} was trained otherwise; name another --keep, or remove it")
    else:
        report = recover(sparse, out, resume=True, **asked.as_dict())
    found = report["recovery"]
    gflops = matmul_gflops(found["options"]["device"], dtype=DTYPES[found["options"]["dtype"]])
    tokens, seconds = (found["curve"][-1][key] for key in ("tokens", "seconds"))
    teacher = 0 if found["options"]["top_k"] else TEACHER * sum(products(folder))
    trained, held = products(sparse)
    work = (TRAINED * trained + HELD * held + teacher) * tokens
    return {
        "kl": found["kl"],
        "curve": found["curve"],
        "epochs": found["epochs"],
        "trained_windows": found["windows"],
        "trained_dtype": found["options"]["dtype"],
        "train_seconds": seconds,
        "trained_tokens_per_second": tokens / seconds if seconds else None,
        "train_peak_memory": max(found["peak_memory"].values()),
        "matmul_gflops": gflops,
        "fraction_of_matmul_rate": work / seconds / 1e9 / gflops if seconds else None,
        "text_sha256": found["tokens_sha256"],
        "diverged": found["diverged"],
    }


def _typed(option: str, value: str) -> Any:
    default = getattr(Recovery(), option)
    if isinstance(default, bool):
        return {"true": True, "false": False}[value.lower()]
    return value if default is None else type(default)(value)


def products(folder: Path) -> tuple[int, int]:
    """Parameters that a token is multiplied with: of the blocks' linear weights, and of the output table."""
    skeleton = Skeleton(Checkpoint(folder))
    linear = sum(w.out_features * w.in_features for w in skeleton.weights if w.block is not None)
    return linear, skeleton.model.get_output_embeddings().weight.numel()


def table(measured: list[dict[str, Any]], cells: list[dict[str, Any]], options: Any) -> str:
    """Markdown: a line for each model; the share of the pruned model's damage that training removed."""
    names = [Path(text).parent.name or text for text in options.judged_on]
    heads = [
        "pattern",
        "tokens",
        *names,
        "removed",
        *options.tasks,
        "seconds",
        "tokens/s",
        "of the matmul rate",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    dense = find(measured, cells[0], options.tasks)
    for wanted in cells:
        row = find(measured, wanted, options.tasks)
        base = find(measured, {**wanted, "tokens": 0, "options": [], "trained_on": None}, options.tasks)
        if row is None:
            lines.append(f"| {wanted['pattern'] or 'dense'} | {wanted['tokens']:,} | not yet measured |")
            continue
        texts = [with_error(text["perplexity"], text["standard_error"]) for text in row["texts"]]
        scored = {
            task["task"]: with_error(task["value"], task["standard_error"], 100) for task in row["tasks"]
        }
        tasks = [scored[name] for name in options.tasks]
        first = [wanted["pattern"] or "dense", f"{row['tokens']:,}"]
        cells_of = [*first, *texts, _removed(dense, base, row), *tasks, *_cost(row)]
        lines.append(f"| {' | '.join(cells_of)} |")
    return "\n".join(lines)


def _removed(dense: dict[str, Any] | None, base: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """On each text, of the perplexity that pruning added."""
    if dense is None or base is None or not row["tokens"]:
        return ""
    each = zip(*(found["texts"] for found in (dense, base, row)), strict=True)
    shares = [(b["perplexity"] - r["perplexity"]) / (b["perplexity"] - d["perplexity"]) for d, b, r in each]
    return ", ".join(f"{share:.1%}" for share in shares)


def _cost(row: dict[str, Any]) -> list[str]:
    if not row.get("train_seconds"):
        return ["", "", ""]
    rate = row["trained_tokens_per_second"]
    return [f"{row['train_seconds']:.0f}", f"{rate:.0f}", f"{row['fraction_of_matmul_rate']:.0%}"]


if __name__ == "__main__":
    main()
