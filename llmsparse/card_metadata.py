"""What the hub reads of a model card: base model, licence, tags, and evaluation results in both of its forms."""

import math
import re
from typing import Any, NamedTuple

from llmsparse.errors import UserError
from llmsparse.publication import CARD, Publication
from llmsparse.runs import Run
from llmsparse.shrinking import read

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LIBRARIES = {
    "packed": "llmsparse",
    "gguf": "gguf",
    "onnx": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
}


class Benchmark(NamedTuple):
    """Where the hub has what a task or text is."""

    dataset: str
    config: str
    split: str


BENCHMARKS = {
    "wikitext2": Benchmark("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "arc_easy": Benchmark("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge", "test"),
    "boolq": Benchmark("aps/super_glue", "boolq", "validation"),
    "copa": Benchmark("aps/super_glue", "copa", "validation"),
    "hellaswag": Benchmark("Rowan/hellaswag", "default", "validation"),
    "lambada_openai": Benchmark("EleutherAI/lambada_openai", "default", "test"),
    "openbookqa": Benchmark("allenai/openbookqa", "main", "test"),
    "piqa": Benchmark("ybisk/piqa", "plain_text", "validation"),
    "winogrande": Benchmark("allenai/winogrande", "winogrande_xl", "validation"),
}


def metadata(found: Publication, run: Run, name: str, base_model: str | None) -> dict[str, Any]:
    """The fields of the card's YAML header; those that nothing is known about are absent.

    Raises:
        UserError: ``base_model`` is no hub id.
    """
    licence = licence_of(found.card)
    fields: dict[str, Any] = {
        "base_model": base(found, base_model),
        "license": licence.get("license"),
        "license_name": licence.get("license_name"),
        "license_link": licence.get("license_link"),
        "library_name": LIBRARIES.get(str(found.export.get("format")), "transformers"),
        "pipeline_tag": "text-generation",
        "tags": tags(found, run),
    }
    fields = {key: value for key, value in fields.items() if value}
    if "base_model" in fields:
        fields["base_model_relation"] = "quantized" if kinds(found) else "finetune"
    if results := evaluations(run):
        fields |= {"model_name": name, "eval_results": results}
    return fields


def base(found: Publication, asked: str | None) -> str | None:
    """The hub id of the dense model: the one asked for, else the one that was downloaded from the hub."""
    if asked is not None and not HUB_ID.fullmatch(asked):
        raise UserError(f"--base-model {asked!r} is no hub id; it is owner/name")
    return asked or (found.report.get("model") if found.report.get("commit") else None)


def licence_of(card: str | None) -> dict[str, Any]:
    """``license`` and its name and link, from the card of the source that lies in the folder."""
    return {key: value for key, value in header_of(card).items() if key.startswith("license") and value}


def header_of(card: str | None) -> dict[str, Any]:
    """The YAML header of a card; empty without one."""
    import yaml

    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card or "", re.DOTALL)
    try:
        header = yaml.safe_load(found.group(1)) if found else {}
    except yaml.YAMLError as error:
        raise UserError(f"the header of {CARD} is not YAML: {' '.join(str(error).split())}") from error
    return header if isinstance(header, dict) else {}


def made_by_us(card: str | None) -> bool:
    """Whether it was ever written by ``llmsparse card``, of whatever weights."""
    listed = header_of(card).get("tags")
    return isinstance(listed, list) and "llmsparse" in listed


def tags(found: Publication, run: Run) -> list[str]:
    patterns = [text.rpartition("=")[2] for text in run.options.get("pattern") or ()]
    pruned = [text for text in patterns if text != "as-is"]
    zeroed = [text for text in pruned if read(text) is None]
    return list(
        dict.fromkeys(
            [
                "llmsparse",
                *(["sparse"] if zeroed or (run.sparsity or 0) > 0.2 else []),
                *pruned,
                *([run.solver] if run.solver and (zeroed or run.weights) else []),
                *kinds(found),
                *([found.export["format"]] if found.export.get("format") else []),
            ]
        )
    )


def kinds(found: Publication) -> list[str]:
    """The integer values that weights are stored in: ``int8``, ``int4``..."""
    asked = [str(kind) for kind in (found.export.get("values") or {}).get("kinds") or ()]
    asked += [str(found.report["grid"]["values"])] if found.report.get("grid") else []
    return sorted({kind.partition(":")[0] for kind in asked if kind.startswith("int")})


def evaluations(run: Run) -> list[Any]:
    """Of ``model-index``: a perplexity for each text, a figure for each task."""
    from huggingface_hub import EvalResult

    results = []
    for name, metric, value, about in _figures(run):
        known = BENCHMARKS.get(name)
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=known.dataset if known else name,
                dataset_name=name,
                dataset_config=known and known.config,
                dataset_split=known and known.split,
                metric_type=metric,
                metric_name=f"{metric} ({about})",
                metric_value=value,
            )
        )
    return results


def entries(run: Run) -> list[dict[str, Any]]:
    """Of ``.eval_results/llmsparse.yaml``: what was measured on datasets that the hub has."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found = []
    for name, metric, value, about in _figures(run):
        if known := BENCHMARKS.get(name):
            task = known.config
            found.append(EvalResultEntry(known.dataset, task, value, notes=f"{metric}, {about}"))
    return eval_result_entries_to_yaml(found)


def _figures(run: Run) -> list[tuple[str, str, float, str]]:
    """(text or task, metric, value, conditions) of everything that is finite."""
    rows = [(row["name"], "perplexity", row.get("perplexity"), _text(row)) for row in run.sources]
    rows += [(row["task"], row.get("metric") or "acc", row.get("value"), _items(row)) for row in run.tasks]
    return [(n, m, v, about) for n, m, v, about in rows if isinstance(v, int | float) and math.isfinite(v)]


def _text(row: dict[str, Any]) -> str:
    return (
        f"context {row.get('context')}, {row.get('windows')} windows, {row.get('tokens')} tokens, llmsparse"
    )


def _items(row: dict[str, Any]) -> str:
    return f"zero-shot, {row.get('items')} of {row.get('of')} items, llmsparse"
