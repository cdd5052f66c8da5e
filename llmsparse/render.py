"""What each command's result looks like on a terminal."""

import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmsparse.export_report import show_check
from llmsparse.figures import byte_size, duration, plain
from llmsparse.runs import sparsity
from llmsparse.shrinking import summary

Row = dict[str, Any]


def prune(report: Row) -> RenderableType:
    """A line for each kind of weight, then coverage, cost, place, and what to do next."""
    seconds, peak = report["seconds"], report["peak_memory"]
    zeros = f"{_coverage(report['coverage'])}; {sparsity(report['weights']) or 0:.2%} of them are zero"
    lines = [
        *map(summary, report.get("smaller", ())),
        *([zeros] if report["weights"] else []),
        *_permutation(report),
        *_rounding(report),
        *_adapter(report),
        f"{duration(sum(seconds.values()))} ({', '.join(f'{k} {duration(v)}' for k, v in seconds.items())}), "
        f"peak memory {byte_size(max(peak.values(), default=0))}",
        *(f"warning: {text}" for text in report.get("warnings", ())),
        f"written to {report['out']}; its report is {report['out']}/report.json",
        *([_pushed(report["push"])] if "push" in report else []),
        f"next: {shlex.join(['llmsparse', 'eval', report['out'], '--against', report['model']])}",
    ]
    tables = [_kinds(report["weights"], measured=True)] if report["weights"] else []
    return Group(*tables, *map(Text, lines))


def _permutation(report: Row) -> list[str]:
    found = report.get("permutation")
    if not found:
        return []
    moved, skipped = found["weights"], found["skipped"]
    before, after = ([one[when] for one in moved] for when in ("before", "after"))
    text = f"channels reordered for {len(moved)} weights"
    if moved:
        text += f": their patterns keep {sum(after) / len(moved):.2%} of w^2 E[x^2], {sum(before) / len(moved):.2%} before"
    if skipped:
        text += f"; not for {len(skipped)}, such as {skipped[0]['name']}: {skipped[0]['reason']}"
    return [text]


def _pushed(result: Row) -> str:
    count, size = len(result["files"]), byte_size(result["bytes"])
    if result["commit"] is None:
        return f"{count} files, {size}, would go to {result['repo']}; nothing was sent"
    return f"{count} files, {size}, are at {result['url']}, commit {result['commit'][:12]}"


def push(result: Row) -> RenderableType:
    """Every file, then where they are."""
    rows = [(file["path"], byte_size(file["bytes"])) for file in result["files"]]
    lines = [_pushed(result), *(f"warning: {text}" for text in result["warnings"])]
    return Group(table(("file", "size >"), rows), *map(Text, lines))


def card(result: Row) -> RenderableType:
    """What the card, which was written already, lacks."""
    return Group(*(Text(f"warning: {text}") for text in result["warnings"]))


def _rounding(report: Row) -> list[str]:
    if "grid" not in report:
        return []
    tables = [f"{t['name']} {t['values']} (error {t['squared_error']:.2g})" for t in report["tables"]]
    return [
        f"values {report['grid']['values']}; tables: {', '.join(tables) or 'kept'}; {report['grid']['note']}"
    ]


def _adapter(report: Row) -> list[str]:
    left = [row["error_left"] for row in report["weights"] if "error_left" in row]
    if not left:
        return []
    rank, share = report["options"]["compensate"], sum(left) / len(left)
    return [
        f"an adapter of rank {rank} in {report['out']}/adapter leaves {share:.1%} of {len(left)} weights' errors"
    ]


def plan(result: Row) -> RenderableType:
    """A line for each kind of weight, then coverage and the expected cost."""
    host, device = (byte_size(result[f"peak_{side}_bytes"]) or "unknown" for side in ("host", "device"))
    lines = [
        _coverage(result["coverage"]),
        f"solver {result['solver']}, calibration {_value(result['calibration'])}",
        f"reads {byte_size(result['read_bytes'])}, writes {byte_size(result['write_bytes'])}",
        f"expected peak memory: host {host}, device {device}; "
        f"expected time {duration(result['seconds_estimate']) or 'unknown'}",
        *(f"warning: {text}" for text in result.get("warnings", ())),
    ]
    return Group(_kinds(result["weights"], measured=False), *map(Text, lines))


def recover(report: Row) -> RenderableType:
    """The table that the recovery lays out itself."""
    from llmsparse.course import show

    return show(report)


def evaluate(result: Row) -> RenderableType:
    """The tables that the evaluation lays out itself."""
    from llmsparse.eval.show import show

    return show(result)


def compare(result: Row) -> RenderableType:
    """The table that the comparison lays out itself."""
    from llmsparse.compare import show

    return show(result)


def report(result: Row) -> RenderableType:
    """Where the pages are, and what a reader of them should know."""
    lines = [f"{result[form]}: {', '.join(result['runs'])}" for form in ("html", "markdown") if result[form]]
    return Group(*map(Text, lines), *(Text(f"warning: {text}") for text in result["warnings"]))


def inspect(result: Row) -> RenderableType:
    """Every weight, then the totals."""
    rows = [
        (w["name"], _shape(w["shape"]), w["dtype"], f"{w['sparsity']:.2%}", w["pattern"] or "")
        for w in result["weights"]
    ]
    totals = result["totals"]
    lines = [
        f"zeros: {totals['weight_sparsity']:.2%} of {totals['weight_parameters']:,} in these weights, "
        f"{totals['sparsity']:.2%} of all {totals['parameters']:,} parameters"
    ]
    if totals["negative_zeros"]:
        lines.append(f"{totals['negative_zeros']:,} of the zeros are -0.0")
    headings = ("weight", "shape", "dtype", "zeros >", "strictest n:m (n kept)")
    return Group(table(headings, rows), *map(Text, lines))


def bench(result: Row) -> RenderableType:
    """A table for each thread count: shapes, and all layers together; beside each time its ratio to torch's bf16."""
    tables: list[RenderableType] = []
    for threads in dict.fromkeys(row["threads"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["threads"] == threads]
        forms = list(dict.fromkeys(row["form"] for row in rows))
        lines = [("all layers", "", [t for t in result["totals"] if t["threads"] == threads])]
        for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
            mine = [row for row in rows if tuple(row["shape"]) == shape]
            lines.append((_shape(shape), str(mine[0]["layers"]), mine))
        cells = [(name, count, *_times(mine, forms)) for name, count, mine in lines]
        shown = table(("shape", "layers >", *(f"{form} >" for form in forms)), cells)
        tables += [
            Text(f"threads {threads}, tokens {result['tokens']}: minimum in µs (times torch bf16's speed)"),
            shown,
        ]
    where = f"{result['processor']}, kernels {result['kernels']}, torch {result['versions']['torch']}"
    return Group(*tables, Text(f"{result['zeros']:.1%} zeros; {where}"))


def _times(rows: list[Row], forms: list[str]) -> list[str]:
    times = {row["form"]: row["min"] for row in rows}
    return [f"{1e6 * times[form]:.1f} ({times['torch bf16'] / times[form]:.2f})" for form in forms]


def doctor(result: Row) -> RenderableType:
    """The kernels and why others do not run, then the rest."""
    rows = [
        (name, "used" if name == result["used"] else why or "usable")
        for name, why in result["kernels"].items()
    ]
    extras = [
        f"extra {name} ({extra['for']}): "
        + ("installed" if extra["installed"] else f"absent, pip install 'llmsparse[{name}]'")
        for name, extra in result["extras"].items()
    ]
    lines = [
        f"processor: {result['processor']}; torch uses {result['threads']} threads",
        *_timed_products(result["products"]),
        *(
            []
            if result["used"]
            else ["packed weights are unpacked by torch for every product: right, but slow"]
        ),
        f"GPU: {result['gpu'] or 'none'}",
        *(f"GPU kernel {name}: {why or 'usable'}" for name, why in result["gpu_kernels"].items()),
        *(f"{key}: {why}" for key, why in result["gpu_products"].items()),
        *extras,
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    return Group(table(("native kernels", ""), rows), *map(Text, lines))


def export(result: Row) -> RenderableType:
    """Bytes before and after, and how the weights are laid out."""
    rows = [
        (
            name,
            byte_size(sizes["before"]),
            byte_size(sizes["after"]),
            f"{sizes['after'] / max(sizes['before'], 1):.1%}",
        )
        for name, sizes in (
            ("files", result["bytes"]),
            ("linear weights", result["linear"]),
            ("embedding and output tables", result["embeddings"]),
        )
    ]
    layouts = ", ".join(f"{count} {name}" for name, count in result["layouts"].items())
    follow = ["llmsparse", "generate", result["out"], "--prompt", "Once upon a time"]
    lines = [
        f"{result['bits_per_weight']:.2f} bits for each linear weight; {layouts}",
        *_needs(result.get("device")),
        *(f"warning: {text}" for text in result["warnings"]),
        f"written to {result['out']} in {duration(result['seconds'])}",
    ]
    if "check" in result:
        lines += show_check(result["check"])
    if "file" not in result:
        lines.append(f"next: {result.get('next') or shlex.join(follow)}")
    return Group(table(("", "before >", "after >", "of it >"), rows), *map(Text, lines))


def export_matrix(result: Row) -> RenderableType:
    """A line for each export, and what kept the others from being written."""
    from llmsparse.matrix_page import HEADINGS, HONEST, fewer, measure, texts

    written = [row for row in result["rows"] if "bytes" in row]
    most = measure(written)
    columns = tuple(f"{heading} >" for heading in HEADINGS)
    runtimes = dict.fromkeys(f"{row['format']}: {row['runtime'] or 'not run'}" for row in written)
    lines = [
        f"runtimes: {'; '.join(runtimes)}",
        HONEST,
        f"perplexity of the source {plain(most['perplexity']['source'])}; {most['tokens']:,} tokens of {most['text']}",
        *fewer(written),
        *(f"{row['name']}: {row['why']}" for row in result["rows"] if row["why"]),
        *(f"warning: {text}" for text in result["warnings"]),
        f"written to {result['out']}" + (f"; drawn in {result['page']}" if result["page"] else ""),
    ]
    return Group(table(("target", *columns), ((r["name"], *texts(r)) for r in written)), *map(Text, lines))


def _needs(device: Row | None) -> list[str]:
    """What a small device must have to run the export."""
    if device is None:
        return []
    return [
        f"on the device: {byte_size(device['flash_bytes'])} of constants (flash), {byte_size(device['ram_bytes'])} of RAM "
        f"for a context of {device['context']} tokens",
        f"a token: {device['macs_per_token']:,} multiply-accumulates with kept weights "
        f"({device['macs_of_the_head']:,} of them in the output layer), and {device['macs_of_attention']:,} more in "
        "attention when the context is full",
    ]


def generate(result: Row) -> RenderableType:
    """Speed; the text was shown while it came."""
    prompt, written = result["prompt_tokens"], result["new_tokens"]
    return Text(
        f"\nprompt: {prompt} tokens, {_rate(result['prompt_tokens_per_second'])}; "
        f"text: {written} tokens, {_rate(result['tokens_per_second'])}"
    )


def _rate(value: float | None) -> str:
    return "too few to time" if value is None else f"{value:.1f} tokens/s"


def _timed_products(products: Row) -> list[str]:
    """How many kinds of layer were timed, and those that dense won; all of them are in --json."""
    if not products:
        return []
    lost = [
        f"{key}: packed {1e6 * row['packed']:.1f} µs, dense {1e6 * row['dense']:.1f} µs, dense is used"
        for key, row in products.items()
        if row["used"] == "dense"
    ]
    return [
        f"{len(products)} kinds of packed layer timed, {len(products) - len(lost)} run packed (all: --json)",
        *lost,
    ]


def choices(result: Row) -> RenderableType:
    """A table for each kind: its names, what each is, and its options where there are any."""
    tables = []
    for kind, rows in result.items():
        wide = any(row.get("options") for row in rows)
        lines = [(row["name"], row["about"], *([row["options"]] if wide else [])) for row in rows]
        tables.append(table((kind, "", "--set") if wide else (kind, ""), lines))
    return Group(*tables)


def demo(result: Row) -> RenderableType:
    """The table that the demonstration lays out itself."""
    from llmsparse.demo import show

    return show(result)


SHOW: dict[str, Callable[[Row], RenderableType]] = {
    "prune": prune,
    "recover": recover,
    "quantize": prune,
    "plan": plan,
    "eval": evaluate,
    "inspect": inspect,
    "export": export,
    "export-matrix": export_matrix,
    "generate": generate,
    "push": push,
    "card": card,
    "recipe": lambda result: Group(),
    "compare": compare,
    "report": report,
    "bench": bench,
    "doctor": doctor,
    "list": choices,
    "demo": demo,
}


def _kinds(weights: list[Row], measured: bool) -> Table:
    """One line for all weights whose names differ in numbers only and that have the same pattern."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for weight in weights:
        name = re.sub(r"\b\d+\b", "*", weight["name"].removesuffix(".weight"))
        kinds.setdefault((name, weight["pattern"]), []).append(weight)
    headings: tuple[str, ...] = ("weights", "pattern", "count >", "shape")
    if measured:
        headings += ("zeros >", "relative output error >")
    rows = []
    for (name, pattern), members in kinds.items():
        shapes = dict.fromkeys(_shape(w["shape"]) for w in members)
        row: tuple[str, ...] = (name, _keeps(pattern), str(len(members)), ", ".join(shapes))
        if measured:
            row += (
                _range((w["sparsity"] for w in members), "{:.1%}"),
                _range((w.get("error") for w in members), "{:.4f}"),
            )
        rows.append(row)
    return table(headings, rows)


def _keeps(pattern: str) -> str:
    """``1:4 (keeps 25 %)``; any other pattern as it is."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return f"{pattern} (keeps {100 * int(match[1]) / int(match[2]):.4g} %)" if match else pattern


def _coverage(coverage: Row) -> str:
    pruned, linear, everything = (coverage[f"{k}_parameters"] for k in ("pruned", "linear", "all"))
    return (
        f"pruned weights hold {pruned:,} parameters: {pruned / max(linear, 1):.1%} of all linear, "
        f"{pruned / max(everything, 1):.1%} of all parameters"
    )


def _range(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    ends = dict.fromkeys((form.format(min(known)), form.format(max(known))))
    return " to ".join(ends)


def table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """A table; a heading that ends in " >" is of numbers."""
    table = Table()
    for heading in headings:
        table.add_column(
            Text(heading.removesuffix(" >")),
            justify="right" if heading.endswith(" >") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    return "none" if value is None else str(value)


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
