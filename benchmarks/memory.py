"""Peak resident memory of pruning: does it grow with the number of blocks, and what does the plain loop need.

    python -m benchmarks.memory

Random llama checkpoints (bfloat16, one file) of 4, 8, 16 and 32 equal blocks, and one of 1.1 billion
parameters, each pruned by llmsparse and by the plain loop in a process of its own; peak of that process above
what it held after its imports. The weights are random: nothing here says how good a pruned model is.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import process, rows

VOCABULARY = 32000
NARROW: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
BILLION: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=[4, 8, 16, 32], help="sizes of the narrow models"
    )
    parser.add_argument(
        "--billion-blocks", type=int, default=16, help="blocks of the wide model; 0 leaves it out"
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--sides", nargs="*", default=["ours", "plain"], choices=["ours", "plain"])
    parser.add_argument("--results", default=rows.RESULTS / "memory.json")
    options = parser.parse_args()
    cases = [(NARROW, blocks) for blocks in options.blocks]
    if options.billion_blocks:
        cases.append((BILLION, options.billion_blocks))
    measured = []
    for shape, blocks in cases:
        for row in _measure(shape, blocks, options):
            rows.append(Path(options.results), row)
            measured.append(row)
    print(table(measured))


def _measure(shape: dict[str, Any], blocks: int, options: Any) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory(prefix="llmsparse-memory-") as work:
        model, tokens = Path(work, "model"), Path(work, "tokens.pt")
        parameters = save_random(shape, blocks, model)
        _save_tokens(options, tokens)
        for side in options.sides:
            print(f"{parameters / 1e6:.0f}M parameters, {blocks} blocks, {side}", file=sys.stderr)
            result = _run(side, model, Path(work, side), tokens, options)
            found.append(
                {
                    "side": side,
                    **shape,
                    "blocks": blocks,
                    "parameters": parameters,
                    "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
                    "samples": options.samples,
                    "sequence_length": options.sequence_length,
                    "bytes_above_imports": result["peak"] - result["imported"],
                    **result,
                    **rows.provenance(),
                }
            )
    return found


def save_random(shape: dict[str, Any], blocks: int, folder: Path, device: str = "cpu") -> int:
    """Write a random llama checkpoint with a tokenizer into ``folder``; returns its number of parameters.

    ``device`` draws the numbers: billions take minutes on a CPU.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tiny import BOS, EOS, tokenizer

    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=blocks, bos_token_id=BOS, eos_token_id=EOS, **shape
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    if device != "cpu":
        torch.cuda.empty_cache()  # another process needs the memory, and measures it
    return parameters


def _save_tokens(options: Any, file: Path) -> None:
    from llmsparse.calibration import calibrate
    from tests.tiny import tokenizer

    sizes = {"samples": options.samples, "sequence_length": options.sequence_length}
    torch.save(calibrate("builtin", tokenizer(), **sizes).windows, file)


def _run(side: str, model: Path, out: Path, tokens: Path, options: Any) -> dict[str, Any]:
    if side == "plain":
        return process.run("benchmarks.plain_loop", model, out, "--windows", tokens)
    sizes = [f"samples={options.samples}", f"sequence_length={options.sequence_length}"]
    return process.run("benchmarks.process", model, out, "solver=sparsegpt", "calibration=builtin", *sizes)


def table(measured: list[dict[str, Any]]) -> str:
    """The rows as markdown: one line per checkpoint, both sides and what was wanted."""
    cases: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in measured:
        cases.setdefault((row["hidden_size"], row["blocks"]), {})[row["side"]] = row
    lines = ["| checkpoint | its file | llmsparse | plain loop | ratio |", "|---|---|---|---|---|"]
    for (width, blocks), sides in cases.items():
        some = next(iter(sides.values()))
        peaks = {side: row["bytes_above_imports"] for side, row in sides.items()}
        ratio = f"{peaks['ours'] / peaks['plain']:.2f}" if len(peaks) == 2 else ""
        lines.append(
            f"| {some['parameters'] / 1e6:.0f}M parameters: {blocks} blocks, hidden {width} "
            f"| {megabytes(some['checkpoint_bytes'])} | {megabytes(peaks.get('ours'))} "
            f"| {megabytes(peaks.get('plain'))} | {ratio} |"
        )
    narrow = [
        (blocks, sides["ours"]["bytes_above_imports"])
        for (width, blocks), sides in sorted(cases.items())
        if width == NARROW["hidden_size"] and "ours" in sides
    ]
    if len(narrow) > 1:
        (few, least), (many, most) = narrow[0], narrow[-1]
        lines.append(
            f"\n{many} blocks against {few}: {most / least:.2f} (wanted for 32 against 4: at most 1.10)."
        )
    lines.append("Wanted of the widest checkpoint: at most 0.50 of the plain loop's.")
    return "\n".join(lines)


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
