"""The model card of a folder that llmsparse wrote: from its report and its evaluations alone."""

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmsparse.card_metadata import kinds, made_by_us, metadata
from llmsparse.command import command_of, commands_of_recovery, pruned_of, recoveries
from llmsparse.figures import byte_size, count, percent, plain, with_error
from llmsparse.local_paths import without_local_paths
from llmsparse.publication import CARD, Publication, collect
from llmsparse.runs import Run, sparsity

LICENCES = {  # of calibration text
    "allenai/c4": "ODC-BY 1.0",
    "Salesforce/wikitext": "CC BY-SA 3.0 and GFDL",
    "self": "the model's own (it wrote the text itself)",
    "builtin": "the Python Software Foundation's (it is Python's own documentation)",
}
NOTHING_FROM_ZEROS = (
    "stores and multiplies every weight: zeros make a zipped download smaller, nothing faster."
)


def card(
    folder: str | Path,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The README.md with which ``push`` publishes ``folder``, to be edited: save it there, and it is used as it is.

    ``repo``: the id that it will have (default: ``OWNER/`` and the folder's name). ``base_model``: the dense model's
    hub id (default: the one that was downloaded). ``write`` is given the text. Returns ``card`` and ``warnings``.

    Raises:
        UserError: no folder that llmsparse wrote, or one that may not be published; ``base_model`` is no hub id.
    """
    found = collect(folder)
    text, warnings = text_of(found, repo or f"OWNER/{found.folder.resolve().name}", base_model)
    if write is not None:
        write(text)
    return {"card": text, "warnings": warnings}


def text_of(found: Publication, repo: str, base_model: str | None) -> tuple[str, list[str]]:
    """The card, and what a reader of it will miss. One that lies in the folder with its mark is taken as it is."""
    if found.card is not None and found.mark in found.card:
        return found.card, []
    from huggingface_hub import ModelCardData

    run = run_of(found)
    fields = metadata(found, run, repo.partition("/")[2], base_model)
    sections = [f"# {repo.partition('/')[2]}", _lead(found, run, fields), *_sections(found, run, repo)]
    header = ModelCardData(**fields).to_yaml()
    missing = {
        "license": "the source's card names no licence",
        "base_model": "the dense model's hub id is unknown",
    }
    advice = {"license": "add `license:` to the card", "base_model": "name it with --base-model"}
    warnings = [f"{why}; {advice[key]}" for key, why in missing.items() if key not in fields]
    if not run.evals:
        warnings.append(
            "nothing was evaluated; `llmsparse eval FOLDER --against DENSE --out FOLDER/eval.json` does it"
        )
    if made_by_us(found.card):
        warnings.append(f"{CARD} in the folder is not used: it lacks the mark of these weights, {found.mark}")
    return f"---\n{header.strip()}\n---\n\n" + "\n\n".join([*sections, found.mark]) + "\n", warnings


def run_of(found: Publication) -> Run:
    """The folder as ``report`` and ``compare`` read it, without local paths."""
    texts = [
        content for name, content in found.files.items() if name.startswith("eval") and name.endswith(".json")
    ]
    evals = tuple(json.loads(text) for text in texts if isinstance(text, bytes))
    return Run(found.folder.resolve().name, found.report or None, evals, found.folder)


def _lead(found: Publication, run: Run, fields: dict[str, Any]) -> str:
    base = fields.get("base_model")
    dense = (
        f"[{base}](https://huggingface.co/{base})" if base else str(found.report.get("model") or "A model")
    )
    parts = []
    if smaller := [section["pattern"] for section in found.report.get("smaller") or ()]:
        parts.append(f"made smaller by {', '.join(f'`{pattern}`' for pattern in smaller)}")
    if pruned := [tag for tag in run.options.get("pattern") or () if tag not in ("as-is", *smaller)]:
        parts.append(f"pruned to {', '.join(f'`{pattern}`' for pattern in pruned)} with `{run.solver}`")
    if run.recovery:
        parts.append(f"then trained on {count(run.recovery['tokens'])} tokens of its dense parent's outputs")
    if found.report.get("grid"):
        how = "in training" if run.recovery else "by calibration"
        parts.append(f"its weights rounded to {found.report['grid']['values']} {how}")
    elif kinds(found):
        parts.append(f"its weights stored as {', '.join(kinds(found))}")
    if found.export.get("format"):
        parts.append(f"exported to `{found.export['format']}`")
    version = (found.report.get("versions") or {}).get("llmsparse", "")
    return f"{dense}, {', '.join(parts) or 'as it was'}, by llmsparse {version}".strip() + "."


def _sections(found: Publication, run: Run, repo: str) -> Iterator[str]:
    yield f"## How to load it\n\n{loading(found, repo)}"
    yield f"## What it is worth\n\n{_worth(run)}"
    if run.options or run.recovery:
        yield f"## How it was made\n\n{_made(run)}"
    yield f"## Size and speed\n\n{_size(found, run)}"
    yield f"## Known losses\n\n{_losses(found, run)}"


def loading(found: Publication, repo: str) -> str:
    """The lines that load it, in a fence."""
    format = found.export.get("format")
    if format in (None, "dense", "compressed-tensors"):
        needs = "`pip install transformers compressed-tensors`" if format == "compressed-tensors" else ""
        lines = [
            "from transformers import AutoModelForCausalLM",
            f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
        ]
        return "\n\n".join(filter(None, [needs, "\n".join(["```python", *lines, "```"])]))
    if format == "packed":
        lines = ["```python", "import llmsparse", f'model = llmsparse.load("{repo}")', "```"]
        return "\n".join(lines)
    if format == "gguf":
        return f"```console\nllama-cli -hf {repo} --hf-file {found.export['file']}\n```"
    return (
        f"```console\nhf download {repo} --local-dir FOLDER\n```\n\n`export.json` says what the files hold."
    )


def _worth(run: Run) -> str:
    rows = [*_texts(run), *_tasks(run)]
    if not rows:
        return "Not measured."
    head = "| measured | this model | dense | conditions |\n|---|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n± is one standard error."


def _texts(run: Run) -> Iterator[tuple[str, ...]]:
    for row in run.sources:
        conditions = f"context {row.get('context')}, {row.get('windows')} windows"
        conditions += f"; text sha256 `{str(row.get('sha256'))[:16]}`"
        dense = (
            with_error(row["dense_perplexity"], row.get("dense_standard_error"))
            if "dense_perplexity" in row
            else ""
        )
        ours = with_error(row.get("perplexity"), row.get("standard_error"))
        yield f"perplexity, {row['name']}", ours, dense, conditions
        if "kl" in row:
            yield (
                f"KL from dense, {row['name']}",
                with_error(row["kl"], row.get("kl_standard_error")),
                "0",
                "nats a token",
            )


def _tasks(run: Run) -> Iterator[tuple[str, ...]]:
    for row in run.tasks:
        dense = _share(row, "dense_") if "dense_value" in row else ""
        about = f"{row.get('metric')}, zero-shot, {row.get('items')} of {row.get('of')} items"
        yield str(row["task"]), _share(row, ""), dense, about


def _share(row: dict[str, Any], whose: str) -> str:
    scale = 100 if row.get("chance") is not None else 1
    found = with_error(row.get(f"{whose}value"), row.get(f"{whose}standard_error"), scale)
    return f"{found} %" if scale == 100 else found


def _made(run: Run) -> str:
    report = run.report or {}
    text = report.get("calibration") or {}
    parts = [f"```console\n{shlex.join(command_of(report))}\n```"] if run.options else []
    if text:
        source = str(text.get("source"))
        size = f"{text.get('samples')} windows of {text.get('sequence_length')} tokens"
        parts.append(
            f"Calibration: {size} of `{source}` ({_licence(source)}); sha256 of the tokens `{text.get('tokens_sha256')}`."
        )
    for command, (found, _) in zip(commands_of_recovery(report), recoveries(report), strict=True):
        parts += _recovered(command, found)
    hashes = [f"`{name}` {value}" for name, value in (report.get("source_files") or {}).items()]
    if hashes:
        whose = pruned_of(report)
        files = "The dense model's files" if whose == report.get("model") else f"The files of `{whose}`"
        parts.append(f"{files}, by sha256: {', '.join(hashes)}.")
    versions = ", ".join(f"{name} {found}" for name, found in (report.get("versions") or {}).items())
    return "\n\n".join([*parts, f"Versions: {versions}." if versions else ""]).strip()


def _licence(source: str) -> str:
    licence = LICENCES.get(source.partition(":")[0])
    return f"its licence: {licence}" if licence else "its licence is its source's"


def _recovered(command: list[str], found: dict[str, Any]) -> Iterator[str]:
    yield f"```console\n{shlex.join(command)}\n```"
    data, kl, windows = found["options"]["data"], found["kl"], found["windows"]
    over = (
        f" over its {few} likeliest tokens and all others as one"
        if (few := found["options"]["top_k"])
        else ""
    )
    yield (
        f"Recovery: {found['tokens']:,} tokens, {plain(found['epochs'])} times {windows['trained']} windows of `{data}` "
        f"({_licence(data)}); sha256 of the tokens `{found['tokens_sha256']}`. KL divergence from the dense model{over} on "
        f"{windows['held_out']} windows held out: {plain(kl['before'])} nats a token before, {plain(kl['after'])} after."
    )


def _size(found: Publication, run: Run) -> str:
    lines, export = [], found.export
    if zeros := sparsity(run.weights):
        lines.append(f"{percent(zeros)} of the pruned weights are zero.")
    if sizes := export.get("bytes"):
        lines.append(
            f"Weight files: {byte_size(sizes['after'])}, of {byte_size(sizes['before'])} before the export; "
            f"{plain(export.get('bits_per_weight'))} bits a linear weight."
        )
    elif run.weight_bytes:
        lines.append(f"Weight files: {byte_size(run.weight_bytes)}; zeros are stored in full.")
    check = export.get("check") or {}
    ran = check.get("runtime") or {}
    if speeds := ran.get("tokens_per_second"):
        each = ", ".join(
            f"{plain(rate)} tokens/s with {n} thread{'s' * (n != '1')}" for n, rate in speeds.items()
        )
        lines.append(
            f"Greedy decoding in {ran['name']} on {check.get('processor') or 'a machine that is not named'}: {each}."
        )
    else:
        lines.append("Speed: not measured.")
    return "\n\n".join(lines)


def _losses(found: Publication, run: Run) -> str:
    lines = []
    if run.lost_most:
        kept = run.capabilities[run.lost_most].get("ability_kept")
        lines.append(
            f"- Of what was measured, {run.lost_most} lost most: {percent(kept, 0)} of the dense model's ability is left."
        )
    if not run.tasks:
        lines.append("- No task was measured; pruning harms a model, measure this one on your own.")
    if (format := found.export.get("format")) not in (None, "packed", "c-header"):
        lines.append(f"- A runtime of `{format}` {NOTHING_FROM_ZEROS}")
    lines += [f"- {warning}" for warning in without_local_paths(run.report or {}).get("warnings") or ()]
    return "\n".join(lines) or "None is known beyond the figures above."
