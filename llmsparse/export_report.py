"""export.json: what an export and its check found, beside the files that it wrote."""

import json
from pathlib import Path
from typing import Any

from llmsparse.atomic import write_whole
from llmsparse.figures import plain
from llmsparse.sha256 import file_sha256

NAME = "export.json"
UNHASHED = (NAME, "report.json", "README.md")  # what is written later, or edited


def write(folder: Path, result: dict[str, Any]) -> None:
    """Put ``result`` beside the files, and into it, unless it has them, their hashes: ``files``."""
    if "files" not in result:
        here = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in UNHASHED]
        result["files"] = {file.name: file_sha256(file) for file in here if not file.name.startswith(".")}
    from llmsparse.report import finite  # brings torch, which lines for a terminal do not need

    text = json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / NAME, text + "\n")


def show_check(check: dict[str, Any]) -> list[str]:
    """What a check found, a line each."""
    found = check["perplexity"]
    lines = [
        f"perplexity: source {plain(found['source'])}, export {plain(found['export'])} "
        f"({found['change']:+.2%}, {check['tolerance']:.1%} allowed), {check['tokens']:,} tokens of {check['text']}",
        f"zeros: {check['zeros']['source']:.1%} of the source's linear weights, {check['zeros']['export']:.1%} of the "
        f"file's; {_kept(check['zeros']['kept'])}",
        f"{check['file_bytes']:,} bytes, {check['bits_per_weight']:.2f} bits a linear weight; {check['says']}",
    ]
    if check["runtime"]:
        lines.append(_runtime(check["runtime"]))
    if check.get("llama_cpp"):
        lines += _parity(check["llama_cpp"])
    return [*lines, *check["notes"]]


def _kept(share: float | None) -> str:
    return "the source has none" if share is None else f"{share:.1%} of the source's are still zero"


def _runtime(ran: dict[str, Any]) -> str:
    speeds = ", ".join(
        f"{rate:.1f} tokens/s with {n} thread{'s' * (int(n) > 1)}"
        for n, rate in ran["tokens_per_second"].items()
    )
    return (
        f"{ran['name']}: loads in {ran['load_seconds']:.1f} s; decodes {speeds or 'too few tokens to time'}"
    )


def _parity(ran: dict[str, Any]) -> list[str]:
    return [
        f"llama.cpp: log-probabilities of {ran['positions']} teacher-forced tokens {ran['mean_apart']:.4f} nats apart "
        f"on average (mean {ran['mean_difference']:+.4f}), {ran['largest_apart']:.3f} at most "
        f"({ran['beyond_list']} beyond its list); "
        f"{ran['same_likeliest']:.1%} likeliest tokens are the same",
        f"llama.cpp: greedy continuation equal for {ran['greedy_equal']} of {ran['greedy_tokens']} tokens",
    ]
