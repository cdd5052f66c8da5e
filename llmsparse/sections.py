"""What a report says of runs: its sections, without any layout."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llmsparse import panels
from llmsparse.blocks import Block, Cell, Facts, Figures, Note, Sample, Samples, Section, Table
from llmsparse.command import command_of, commands_of_recovery, pruned_of, recoveries
from llmsparse.figures import byte_size, count, duration, percent, plain, with_error
from llmsparse.measures import Key, Measure, change, labels, measures, same_data, source_name, with_dense
from llmsparse.plots import Look, looks
from llmsparse.runs import Run
from llmsparse.shrinking import summary

Row = dict[str, Any]


class View(NamedTuple):
    """The runs as a report shows them: dense models first, each with its look."""

    runs: list[Run]  # as they were given
    columns: list[Run]  # with dense models
    dense: dict[str, Run]  # by the pruned run's name
    looks: dict[str, Look]
    labels: dict[Key, str]

    @classmethod
    def of(cls, runs: list[Run]) -> "View":
        columns, dense = with_dense(runs)
        first = len({id(run) for run in dense.values()})
        found = looks(first, len(columns) - first)
        named = {run.name: look for run, look in zip(columns, found, strict=True)}
        return cls(runs, columns, dense, named, labels(columns))

    def head(self, run: Run) -> Cell:
        return Cell(run.name, look=self.looks[run.name])

    def legend(self, runs: Iterable[Run]) -> list[tuple[Look, str]]:
        return [(self.looks[run.name], run.name) for run in runs]

    def beside(self, run: Run, key: Key, measure: Measure) -> Measure | None:
        """The dense figure of the same evaluation, else the dense run's own."""
        dense = self.dense.get(run.name)
        found = measures(dense).get(key) if dense else None
        return measure.dense or (found if found and same_data(measure, found) else None)


def sections(runs: list[Run]) -> list[Section]:
    """Everything the runs have to say; what was not measured is said too."""
    view = View.of(runs)
    made = (_runs, _quality, _capabilities, _fidelity, _recovery, _layers, _generation, _reproduce)
    return [section for make in made if (section := make(view)) is not None]


# ---- the runs


def _runs(view: View) -> Section:
    columns: list[tuple[str, Any]] = [
        ("solver", lambda run: run.solver or ""),
        ("pattern", lambda run: run.pattern or ""),
        ("zeros", lambda run: percent(run.sparsity)),
        ("of the model", _pruned),
        ("weight files", lambda run: byte_size(run.weight_bytes)),
        ("time to prune", lambda run: _total(run, "seconds", sum, duration)),
        ("peak memory", lambda run: _total(run, "peak_memory", max, byte_size)),
        ("tokens/s", lambda run: plain(run.tokens_per_second) if run.tokens_per_second else ""),
    ]
    shown = [(head, [of(run) for run in view.columns]) for head, of in columns]
    shown = [(head, values) for head, values in shown if any(values)]
    rows = [[view.head(run), *(Cell(values[i]) for _, values in shown)] for i, run in enumerate(view.columns)]
    words = 1 + sum(head in ("solver", "pattern") for head, _ in shown)
    blocks: list[Block] = [Table("", [Cell("run"), *(Cell(head) for head, _ in shown)], rows, words)]
    blocks += [
        Facts(f"Warnings of {run.name} ({len(found)})", [("", line) for line in found])
        for run in view.runs
        if (found := (run.report or {}).get("warnings"))
    ]
    lead = "Zeros are counted in the pruned weights; of the model: how many of all parameters those weights hold."
    return Section("runs", "Runs", lead, blocks)


def _pruned(run: Run) -> str:
    return percent(((run.report or {}).get("coverage") or {}).get("of_all"))


def _total(run: Run, key: str, of: Any, write: Any) -> str:
    values = list(((run.report or {}).get(key) or {}).values())
    return write(of(values)) if values else ""


# ---- perplexity and accuracy


def _quality(view: View) -> Section:
    blocks: list[Block] = []
    if view.labels:
        shown = [run for run in view.columns if measures(run)]
        rows = [_figures_of(view, key, name, shown) for key, name in view.labels.items()]
        blocks.append(Table("", [Cell("measure"), *map(view.head, shown)], rows))
        blocks += _by_word(view, shown)
    if missing := [run for run in view.runs if not measures(run)]:
        names, more = ", ".join(run.name for run in missing), " for the first" if len(missing) > 1 else ""
        blocks.append(
            Note(f"Not evaluated: {names}. This does it{more}: {shlex.join(_to_evaluate(missing[0]))}")
        )
    if len(view.runs) > 1 and (figures := panels.against_bytes(view.columns, view.looks, view.labels)):
        shown = [run for run in view.columns if run.weight_bytes]
        blocks.append(Figures("Against the bytes of the weight files", figures, view.legend(shown)))
        blocks.append(Note(READING))
    lead = "± is one standard error. The second line compares with the dense model: × for how many times its "
    lead += "perplexity, percentage points for accuracy (with the paired standard error where it is known)."
    return Section("quality", "Perplexity and accuracy", lead if view.labels else "Not measured.", blocks)


READING = "Dashed: the runs that no other beats in size and figure both. Dotted: what guessing reaches."


def _to_evaluate(run: Run) -> list[str]:
    against = ["--against", run.against] if run.against else []
    where = str(run.folder or run.model or run.name)
    return ["llmsparse", "eval", where, *against, "--out", f"{where}/eval.json"]


def _figures_of(view: View, key: Key, name: str, runs: Sequence[Run]) -> list[Cell]:
    cells, about = [], ""
    for run in runs:
        measure = measures(run).get(key)
        if measure is None:
            cells.append(Cell("not measured"))
            continue
        about = about or _about(measure)
        cells.append(Cell(str(measure), change(measure, view.beside(run, key, measure))))
    return [Cell(name, about), *cells]


def _about(measure: Measure) -> str:
    row = measure.row
    if not measure.is_task:
        context = f", context {row['context']}" if row.get("context") else ""
        return f"perplexity, less is better{context}"
    if measure.scale == 1:
        return f"{row.get('metric')}, on its own scale"
    chance = f", guessing {percent(row['chance'], 0)}" if row.get("chance") else ""
    return f"% {row.get('metric') or 'right'}, more is better{chance}"


def _by_word(view: View, runs: Sequence[Run]) -> list[Block]:
    rows = []
    runs = [run for run in runs if any(f"{unit}_perplexity" in row for row in run.sources for unit in UNITS)]
    for key, name in view.labels.items():
        for unit in UNITS:
            found = [(m := measures(run).get(key)) and m.row for run in runs]
            if any(row and f"{unit}_perplexity" in row for row in found):
                rows.append([Cell(name, f"per {unit}"), *(_unit(row, unit) for row in found)])
    title = "Perplexity per word and byte, which tokenizers do not change"
    return [Table(title, [Cell("measure"), *map(view.head, runs)], rows)] if rows else []


UNITS = ("word", "byte")


def _unit(row: Row | None, unit: str) -> Cell:
    if not row or row.get(f"{unit}s") is None:
        return Cell("")
    return Cell(with_error(row[f"{unit}_perplexity"], row.get(f"{unit}_standard_error")))


# ---- capabilities


def _capabilities(view: View) -> Section | None:
    runs = [run for run in view.runs if run.capabilities]
    if not runs:
        return None
    groups = dict.fromkeys(group for run in runs for group in run.capabilities)
    rows = []
    for group in groups:
        tasks = dict.fromkeys(t for run in runs for t in run.capabilities.get(group, {}).get("tasks") or ())
        rows.append([Cell(group, ", ".join(tasks)), *(_kept(run, group) for run in runs)])
    blocks: list[Block] = [Table("", [Cell("capability"), *map(view.head, runs)], rows)]
    if figure := panels.ability(runs, view.looks, view.labels):
        blocks.append(Figures("", [figure], view.legend(runs) if len(runs) > 1 else ()))
    lead = (
        "How much of what the dense model can do above guessing is left. Not measured: no task covers it, or "
    )
    lead += "there was no dense model beside. Not measurable: the dense model is not above guessing itself."
    return Section("capabilities", "Ability kept, by capability", lead, blocks)


def _kept(run: Run, group: str) -> Cell:
    row = run.capabilities.get(group) or {}
    mark = "lost most" if group == run.lost_most else ""
    if row.get("ability_kept") is None:
        return Cell(row.get("status") or "not measured")
    return Cell(percent(row["ability_kept"], 0), mark=mark)


# ---- fidelity


def _fidelity(view: View) -> Section | None:
    rows = [
        [view.head(run), Cell(source_name(row)), *_agreement(row)]
        for run in view.runs
        for row in run.sources
        if "kl" in row
    ]
    if not rows:
        return None
    head = [Cell(h) for h in ("run", "text", "KL, nats a token", "top-1 agreement", "top-5 agreement")]
    blocks: list[Block] = [Table("", head, rows, words=2)]
    for name, found, figures in panels.positions(view.runs, view.looks):
        legend = view.legend(found) if len(found) > 1 else ()
        blocks.append(Figures(f"{name}, by position in the window", figures, legend))
    lead = "How near the next-token predictions are to the dense model's, whatever the right token is."
    return Section("fidelity", "Fidelity to the dense model", lead, blocks)


def _agreement(row: Row) -> Iterator[Cell]:
    yield Cell(with_error(row["kl"], row.get("kl_standard_error")))
    for key in ("top1_agreement", "top5_agreement"):
        yield Cell(percent(row.get(key)) or "not measured")


# ---- recovery


def _recovery(view: View) -> Section | None:
    runs = [run for run in view.runs if run.recovery]
    if not runs:
        return None
    head = [Cell(h) for h in ("run", "teacher", "tokens", "times the text", "KL before", "KL after", "time")]
    rows = []
    for run in runs:
        found, kl = run.recovery, run.recovery["kl"]
        figures = (count(found["tokens"]), plain(found["epochs"]), plain(kl["before"]), plain(kl["after"]))
        time = duration(sum(found["seconds"].values()))
        rows.append([view.head(run), Cell(found["teacher"]), *map(Cell, (*figures, time))])
    figures_of = Figures("", [panels.recovery(runs, view.looks)], view.legend(runs) if len(runs) > 1 else ())
    lead = "Training after pruning, zeros held, towards the dense model's next-token distribution; KL in nats a token on "
    lead += "text that was held out."
    return Section("recovery", "Recovery", lead, [Table("", head, rows, words=2), figures_of])


# ---- layers


def _layers(view: View) -> Section | None:
    runs = [run for run in view.runs if run.weights]
    if not runs:
        return None
    blocks: list[Block] = [
        Figures(run.name if len(runs) > 1 else "", found) for run, found in panels.layers(runs, view.looks)
    ]
    blocks += [
        Note(f"{run.name}: no relative error, because {_why_no_error(run)}.")
        for run in runs
        if all(weight.get("error") is None for weight in run.weights)
    ]
    lead = (
        "A bar is the mean over a block's (or a kind's) weights, a dot its worst weight. Relative error: how "
    )
    lead += "much of a weight's output on the calibration text was changed, 0 for none of it, in squares."
    return Section("layers", "Layer by layer", lead, blocks)


def _why_no_error(run: Run) -> str:
    if run.recovery:
        return "its weights were trained after they were pruned"
    return f"{run.solver or 'its solver'} reads no calibration text"


# ---- generation


def _generation(view: View) -> Section | None:
    runs = [run for run in view.runs if run.generation]
    if not runs:
        return None
    rates: list[list[Cell]] = []
    for run in runs:
        dense = view.dense.get(run.name)
        whose = view.head(dense) if dense else Cell(f"{run.name}, dense")
        for name, before in ((whose, "dense_"), (view.head(run), "")):
            row = [name, *(Cell(percent((run.generation or {}).get(before + key))) for key in RATES)]
            if any(cell.text for cell in row[1:]) and row not in rates:
                rates.append(row)
    head = [Cell(h) for h in ("run", "repeated 4-grams", "ended by itself")]
    blocks: list[Block] = [Table("", head, rates)] if rates else []
    blocks += [_samples(run, is_open=run is runs[0]) for run in runs]
    counts = dict.fromkeys(str(n) for run in runs if (n := (run.generation or {}).get("new_tokens")))
    tokens = f" of {' or '.join(counts)} tokens" if counts else ""
    lead = f"Greedy continuations{tokens}; they are to be looked at, and measure nothing."
    return Section("generation", "Generated text", lead, blocks)


RATES = ("repetition", "terminated")


def _samples(run: Run, is_open: bool) -> Samples:
    samples = []
    for row in (run.generation or {}).get("samples") or ():
        texts = [("dense", row["dense_continuation"])] if "dense_continuation" in row else []
        texts.append(("sparse" if texts else run.name, row.get("continuation") or ""))
        samples.append(Sample(str(row.get("prompt") or ""), [(who, str(text)) for who, text in texts]))
    return Samples(run.name, samples, is_open)


# ---- reproduction


def _reproduce(view: View) -> Section:
    blocks = [facts for run in view.runs for facts in _facts(run)]
    return Section("reproduce", "To reproduce this", "Options, versions and hashes of every step.", blocks)


def _facts(run: Run) -> Iterator[Facts]:
    if run.report is not None and (run.options or not run.recovery):
        yield Facts(f"{run.name}: pruning", _pruning(run.report), shlex.join(command_of(run.report)))
    report = run.report or {}
    each = list(zip(commands_of_recovery(report), recoveries(report), strict=True))
    for i, (command, (found, _)) in enumerate(each, 1):
        number = f" {i}" if len(each) > 1 else ""
        yield Facts(f"{run.name}: recovery{number}", _recovering(found), shlex.join(command))
    for i, found in enumerate(run.evals, 1):
        number = f" {i}" if len(run.evals) > 1 else ""
        yield Facts(f"{run.name}: evaluation{number}", _evaluation(found))


def _pruning(report: Row) -> list[tuple[str, str]]:
    calibration = report.get("calibration") or {}
    rows = [("model", str(pruned_of(report)))]
    rows += [("made smaller", summary(section)) for section in report.get("smaller") or ()]
    rows += [(f"sha256 of {name}", str(value)) for name, value in (report.get("source_files") or {}).items()]
    if calibration:
        size = f"{calibration.get('samples')} windows of {calibration.get('sequence_length')} tokens"
        rows += [("calibration", f"{calibration.get('source')}: {size}")]
        rows += [("sha256 of its tokens", str(calibration.get("tokens_sha256")))]
    rows += [
        (f"sha256 of {source.get('source')}", str(source["sha256"]))
        for source in calibration.get("sources") or ()
        if source.get("sha256")
    ]
    rows += [(f"sha256 of written {name}", str(value)) for name, value in (report.get("files") or {}).items()]
    return [*rows, *_versions(report)]


def _recovering(found: Row) -> list[tuple[str, str]]:
    rows = [("of", found["sparse"]), ("teacher", found["teacher"])]
    for key, whose in (("source_files", ""), ("teacher_files", "the teacher's ")):
        rows += [(f"sha256 of {whose}{name}", str(value)) for name, value in found[key].items()]
    size = f"{found['windows']['trained']} windows, {found['windows']['held_out']} held out"
    rows += [
        ("text", f"{found['options']['data']}: {size}"),
        ("sha256 of its tokens", found["tokens_sha256"]),
    ]
    return [*rows, *_versions(found)]


def _evaluation(found: Row) -> list[tuple[str, str]]:
    rows = [(key, str(found[key])) for key in ("model", "against") if found.get(key)]
    rows += [
        (key, str(found[key]) if found[key] is not None else "none")
        for key in ("context", "stride", "bos", "dtype", "device", "limit")
        if key in found and found.get("sources" if key in ("context", "stride", "bos") else "kind")
    ]
    for row in found.get("sources") or ():
        rows.append((source_name(row), f"{row.get('data')}; {_counts(row)}"))
        rows.append((f"sha256 of {source_name(row)}", str(row.get("sha256"))))
    for row in found.get("tasks") or ():
        if row.get("group"):
            continue
        rows.append((str(row.get("task")), f"{row.get('data')}; {row.get('items')} of {row.get('of')} items"))
        if row.get("sha256"):
            rows.append((f"sha256 of {row.get('task')}", row["sha256"]))
    rows += [("seconds", ", ".join(f"{k} {v}" for k, v in (found.get("seconds") or {}).items()))]
    return [*(row for row in rows if row[1]), *_versions(found)]


def _counts(row: Row) -> str:
    counts = [f"{row[key]:,} {key}" for key in ("tokens", "words", "bytes", "windows") if row.get(key)]
    return ", ".join(counts)


def _versions(found: Row) -> list[tuple[str, str]]:
    versions = found.get("versions") or {}
    return (
        [("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))] if versions else []
    )
