"""Zero-shot items per second: prefixes shared between choices, against lm-evaluation-harness's own HFLM.

    python -m benchmarks.shared_prefix MODEL [--tasks hellaswag arc_easy ...] [--limit 100] [--runs 3]

Both sides answer the same requests in one process, in turn, in the same dtype; every answer is compared.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from llmsparse.checkpoint import Checkpoint
from llmsparse.device import forward_dtype, pick_device
from llmsparse.eval.harness import SharedPrefixLM
from llmsparse.eval.models import load_model
from llmsparse.eval.tasksource import find_tasks, load_tasks


def main() -> None:
    options = _parse()
    checkpoint, device = Checkpoint.open(options.model), pick_device(options.device)
    dtype = forward_dtype(options.dtype, checkpoint.stored_dtype, device)
    model, tokenizer = load_model(checkpoint, dtype, device, False), checkpoint.tokenizer()
    harness, ours = _sides(model, tokenizer, options)
    loaded = load_tasks(find_tasks(",".join(options.tasks)))
    print(
        "| task | items | HFLM items/s | shared prefixes items/s | ratio | answers that differ | most, nats |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, task in loaded["tasks"].items():
        task.build_all_requests(limit=options.limit, rank=0, world_size=1)
        figures = _measure(harness, ours, task.instances, options.runs)
        row = {"question": "zero-shot items per second", "model": rows.public(options.model), "task": name,
               "limit": options.limit, "harness_batch_size": options.harness_batch_size,
               "batch_tokens": options.batch_tokens, "dtype": str(dtype).removeprefix("torch."),
               "device": str(device), **figures, **rows.provenance()}  # fmt: skip
        rows.append(Path(options.results), row)
        print(
            f"| {name} | {row['items']} | {row['harness_items_per_second']} | {row['items_per_second']} | "
            f"{row['ratio']} ({min(row['ratios'])} to {max(row['ratios'])}) | {row['choices_that_differ']} | "
            f"{row['largest_difference']:.1e} |"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--tasks", nargs="+", default=["hellaswag", "arc_easy", "winogrande", "copa", "lambada_openai"]
    )
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--harness-batch-size", type=int, default=16, help="requests a forward pass of HFLM")
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens a forward pass of ours")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--results", default=rows.RESULTS / "shared_prefix.json")
    return parser.parse_args()


def _sides(model: Any, tokenizer: Any, options: Any) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.harness_batch_size)
    return harness, SharedPrefixLM(model, tokenizer, batch_tokens=options.batch_tokens, name=options.model)


def _measure(harness: Any, ours: Any, requests: list[Any], runs: int) -> dict[str, Any]:
    items = len({request.doc_id for request in requests})
    seconds: dict[str, list[float]] = {"harness": [], "ours": []}
    answers: dict[str, list[tuple[float, bool]]] = {}
    for run in range(runs):
        pair = [("harness", harness), ("ours", ours)]
        for side, model in pair if run % 2 == 0 else reversed(pair):
            start = time.perf_counter()
            answers[side] = model.loglikelihood(requests, disable_tqdm=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[side].append(time.perf_counter() - start)
    ratios = [round(a / b, 2) for a, b in zip(seconds["harness"], seconds["ours"], strict=True)]
    differences = [abs(a[0] - b[0]) for a, b in zip(answers["harness"], answers["ours"], strict=True)]
    greedy = sum(a[1] != b[1] for a, b in zip(answers["harness"], answers["ours"], strict=True))
    return {
        "items": items,
        "requests": len(requests),
        "harness_items_per_second": round(items / statistics.median(seconds["harness"]), 2),
        "items_per_second": round(items / statistics.median(seconds["ours"]), 2),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "choices_that_differ": _choices_that_differ(requests, answers),
        "greedy_that_differ": greedy,
        "largest_difference": max(differences),
        "shared": ours.shares is True,
    }


def _choices_that_differ(requests: list[Any], answers: dict[str, list[tuple[float, bool]]]) -> int:
    """Items whose likeliest choice is not the same on both sides."""
    chosen: dict[str, dict[int, tuple[float, int]]] = {side: {} for side in answers}
    for place, request in enumerate(requests):
        for side, best in chosen.items():
            answer = (answers[side][place][0], -request.idx)
            best[request.doc_id] = max(best.get(request.doc_id, answer), answer)
    first, second = chosen.values()
    return sum(first[item][1] != second[item][1] for item in first)


if __name__ == "__main__":
    main()
