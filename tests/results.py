"""Results as llmsparse eval and llmsparse prune write them, made up; and folders that hold them."""

import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ENDS = (31, 63, 127, 255, 511, 1023, 2047)
VERSIONS = {"python": "3.11.7", "llmsparse": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
TASKS = {"hellaswag": ("acc_norm", 0.25, "language"), "arc_easy": ("acc", 0.25, "reasoning")}
TASKS |= {"mmlu": ("acc", 0.25, "knowledge"), "lambada_openai": ("acc", 0.0, "language")}


def source(perplexity: float = 30.1, dense: float | None = 20.7, **changed: Any) -> Row:
    row: Row = {
        "name": "wikitext2",
        "data": "WikiText-2 (raw, test): rows joined by blank lines",
        "sha256": "696cca6b" * 8,
        "perplexity": perplexity,
        "standard_error": perplexity / 25,
        "word_perplexity": perplexity**1.3,
        "word_standard_error": perplexity / 15,
        "byte_perplexity": perplexity**0.25,
        "byte_standard_error": 0.0123,
        "tokens": 32752,
        "words": 24000,
        "bytes": 140000,
        "windows": 16,
    }
    if dense is not None:
        kl = max(perplexity / dense - 1, 0.01)
        row |= {"dense_perplexity": dense, "dense_standard_error": dense / 25}
        row |= {"kl": kl, "kl_standard_error": kl / 20, "top1_agreement": 0.71, "top5_agreement": 0.93}
        row["positions"] = [
            {"from": (end + 1) // 2, "to": end, "tokens": 500, "perplexity": perplexity + 40 / end}
            | {"dense_perplexity": dense + 20 / end, "kl": kl * (1 + 5 / end)}
            | {"top1_agreement": (0.71 - 2 / end) / (1 + kl / 9), "top5_agreement": 0.93 - (1 + kl) / end}
            for end in ENDS
        ]
    return row | changed


def task(name: str = "hellaswag", value: float = 0.36, dense: float | None = 0.43, **changed: Any) -> Row:
    metric, chance, capability = TASKS.get(name, ("acc", 0.5, "ungrouped"))
    items = changed.get("items", 500)
    answers = "".join(random.Random(f"{name}{value}").choices("10", (value, 1 - value), k=items))
    row: Row = {
        "task": name,
        "metric": metric,
        "value": value,
        "standard_error": 0.022,
        "metrics": {metric: [value, 0.022]},
        "chance": chance,
        "items": items,
        "of": 10042,
        "answers": answers,
        "data": f"{name}.jsonl",
        "sha256": "0f" * 32,
        "capability": capability,
    }
    if dense is not None:
        kept = (value - chance) / (dense - chance)
        row |= {"dense_value": dense, "dense_standard_error": 0.022, "lost": 60, "gained": 25}
        row |= {"ability_kept": {"value": kept, "low": kept - 0.15, "high": kept + 0.14}}
        row |= {"ability": f"{kept:.0%} ({kept - 0.15:.0%} to {kept + 0.14:.0%})"}
    return row | changed


def evaluation(model: str = "pruned", against: str | None = "dense", **changed: Any) -> Row:
    """One with a text only; ``changed`` adds the rest."""
    found: Row = {"kind": "llmsparse eval", "model": model, "model_bytes": 269_060_552}
    if against is not None:
        found |= {"against": against, "against_bytes": 269_060_552}
    found |= {"dtype": "float32", "device": "cpu", "versions": VERSIONS, "seconds": {"perplexity": 81.2}}
    found |= {"context": 2048, "stride": None, "bos": "no BOS: the tokenizer adds none"}
    return found | {"sources": [source(dense=20.7 if against else None)]} | changed


def full_evaluation(factor: float = 1.45, against: str | None = "dense", **changed: Any) -> Row:
    """With texts, tasks, capabilities and generated text; ``factor`` is how much worse than dense."""
    dense = {"hellaswag": 0.43, "arc_easy": 0.58, "mmlu": 0.26, "lambada_openai": 0.41}
    found = {name: value - (value - 0.25) * min((factor - 1) / 2, 1.1) for name, value in dense.items()}
    tasks = [task(name, found[name], value if against else None) for name, value in dense.items()]
    if against:
        tasks[2] |= {"ability_kept": None, "ability": "not measurable"}
    groups = {"language": ["hellaswag", "lambada_openai"], "knowledge": ["mmlu"], "reasoning": ["arc_easy"]}
    groups |= {"code": [], "other languages": []}
    kept = {"language": max(1.8 - factor, 0.02), "reasoning": max(1.7 - factor, -0.05)}
    status = {"language": "measured", "reasoning": "measured", "knowledge": "not measurable"}
    capabilities = [
        {"capability": c, "tasks": t, "ability_kept": kept.get(c), "status": status.get(c, "not measured")}
        for c, t in groups.items()
    ]
    texts = [source(20.7 * factor, 20.7 if against else None)]
    texts.append(source(31 * factor, 31.0 if against else None, name="c4", data="C4", sha256="1b" * 32))
    extra = {"sources": texts, "tasks": tasks, "generation": generation(against is not None)}
    if against:
        extra |= {"capabilities": capabilities, "lost_most": "reasoning"}
    return evaluation(against=against, tokens_per_second=12.3 * factor, **extra) | changed


def generation(dense: bool = True) -> Row:
    samples = [
        {"prompt": "The tower was built in", "continuation": "1889 and it was the tallest in the " * 6},
        {"prompt": "To bake bread you", "continuation": "need <b>flour</b> & `water` | salt\n\nand time"},
    ]
    found: Row = {"new_tokens": 64, "samples": samples, "repetition": 0.41, "terminated": 0.0}
    if dense:
        for sample in samples:
            sample["dense_continuation"] = "1889 by the company of Gustave Eiffel, for the World's Fair. " * 3
        found |= {"dense_repetition": 0.12, "dense_terminated": 0.25}
    return found


def report(solver: str = "sparsegpt", pattern: str = "50%", blocks: int = 30, **changed: Any) -> Row:
    draw = random.Random(solver + pattern)
    weights = [
        {"name": f"model.layers.{i}.{kind}.weight", "shape": [576, 576], "pattern": pattern, "sparsity": 0.5}
        | {"error": None if solver == "magnitude" else draw.uniform(0.2, 1) * 0.2 * (i + 3) / 33}
        for i in range(blocks)
        for kind in KINDS
    ]
    options = {
        "solver": solver,
        "pattern": [pattern],
        "scope": None,
        "calibration": "c4.jsonl",
        "samples": 128,
    }
    options |= {"sequence_length": 512, "seed": 0, "skip": [], "trust_remote_code": False, "processes": 1}
    found = {"model": "dense", "out": "pruned", "versions": VERSIONS, "options": options, "weights": weights}
    found |= {"source_files": {"model.safetensors": "7e" * 32}, "files": {"model.safetensors": "ac" * 32}}
    found["calibration"] = {"source": "c4.jsonl", "samples": 128, "sequence_length": 512} | {
        "tokens_sha256": "f4" * 32,
        "sources": [{"source": "c4.jsonl", "sha256": "e8" * 32}],
    }
    found |= {
        "seconds": {"read": 2.7, "forward": 161.6},
        "peak_memory": {"read": 10**9, "forward": 27 * 10**8},
    }
    return found | {"coverage": {"of_linear": 0.79, "of_all": 0.789}, "warnings": []} | changed


def write(file: Path, found: Row) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return str(file)


def pruned_folder(folder: Path, *evals: Row, **options: Any) -> str:
    """A folder with a report.json and an eval.json for each of ``evals``."""
    write(folder / "report.json", report(**options))
    for i, found in enumerate(evals):
        write(folder / f"eval{i or ''}.json", found)
    return str(folder)


def scenes(folder: Path) -> dict[str, tuple[str, ...]]:
    """Runs to lay out: name of the scene -> RUN arguments."""
    four = [
        pruned_folder(folder / f"{solver}-{pattern.replace(':', 'of')}", full, solver=solver, pattern=pattern)
        for solver, pattern, full in (
            ("sparsegpt", "50%", full_evaluation(1.35)),
            ("wanda", "50%", full_evaluation(1.5)),
            ("magnitude", "50%", full_evaluation(12.0)),
            ("sparsegpt", "2:4", full_evaluation(2.1, model_bytes=160_000_000)),
        )
    ]
    long = "a-model-with-a-name-that-never-ends-" * 4
    wide = full_evaluation(1.4)
    wide["tasks"][0]["task"] = wide["sources"][0]["name"] = "an_uncommonly_long_name_of_something_" * 3
    wide["generation"]["samples"][0]["continuation"] = "x" * 900
    wide["bos"] = "<script>alert(1)</script> " + "y" * 300
    return {
        "one": (four[0],),
        "four": tuple(four),
        "unmeasured": (pruned_folder(folder / "unmeasured", blocks=4),),
        "minimal": (write(folder / "minimal.json", evaluation(against=None)),),
        "long": (f"{long}={pruned_folder(folder / 'long', wide, blocks=80)}", *four[1:]),
    }
