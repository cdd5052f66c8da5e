"""What a recovery leaves: the best weights in OUT, and a report that tells how they came about."""

import shutil
from typing import TYPE_CHECKING, Any

from llmsparse import gridfile
from llmsparse.apart import Text
from llmsparse.calibration import Calibration
from llmsparse.command import pruned_of, recoveries
from llmsparse.course import Course
from llmsparse.errors import UserError
from llmsparse.extent import TABLES, Extent
from llmsparse.recovery import Recovery
from llmsparse.training import Training
from llmsparse.writer import Writer

if TYPE_CHECKING:
    from llmsparse.recover import Run

GONE = ("error_from", "error_left", "block_error")  # of a row of SPARSE's report: no longer so
GB = 1e9
NOTED = 6  # bytes of a likeliest token


def check_room(writer: Writer, extent: Extent, options: Recovery, tokens: int = 0) -> None:
    """Refuse a disk that does not hold OUT and what a run can go on from, each file twice while it is replaced.

    ``tokens``: of the text, once it is known. What an interrupted run left is room that is taken already.
    """
    numbers = sum(w.out_features * w.in_features for w in extent.weights)
    state = 0 if options.train == "lora" else 12 * numbers
    needed = writer.bytes + 2 * (4 * numbers + state) + NOTED * options.top_k * tokens
    needed -= sum(file.stat().st_size for file in writer.work.rglob("*") if file.is_file())
    parent = next(p for p in writer.work.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"the disk is too full for {writer.out} and a run's state: {needed / GB:.2f} GB, {free / GB:.2f} GB are free "
            f"in {parent}; make room, or choose another OUT"
        )


def write(writer: Writer, training: Training, report: dict[str, Any]) -> None:
    """The best weights, everything else as it is in SPARSE, and what the report says of them."""
    student = training.student
    rows = student.write(writer, *training.best())
    before = {
        row["name"]: {key: value for key, value in row.items() if key not in GONE}
        for row in report["weights"]
    }
    report["weights"] = [{**before.get(row["name"], {}), **row, "error": None} for row in rows]
    report["tables"] = [*report["tables"], *student.write_tables(writer)]
    if grids := student.extent.grids:
        tables = report.get("grid", {}).get("tables") or str(TABLES)
        grid = next(iter(grids.values()))
        report["grid"] = gridfile.described(grid, tables, writer.checkpoint.stored_dtype)
    writer.copy(sorted(set(writer.checkpoint.names()) - student.written()))
    writer.prepare_to_finish(report)


def report_of(
    run: "Run", writer: Writer, fingerprint: dict[str, Any], text: Calibration, windows: Text, course: Course
) -> dict[str, Any]:
    """The report of SPARSE with that of the recovery in it; what is dense is the teacher."""
    options, warnings = run.options, list(run.ancestry.report.get("warnings") or ())
    if course.diverged:
        warnings.append(f"{course.diverged}; training stopped there, use a smaller --lr than {options.lr:g}")
    if not course.best_step:
        rounded = f", rounded to {options.values}" if options.values else ""
        warnings.append(
            f"no step was better on the held-out text than none: the weights are those of SPARSE{rounded}"
        )
    tokens = course.step * options.batch * options.sequence_length
    recovery = {
        "sparse": run.name,
        "pruned": pruned_of(run.ancestry.report),
        "earlier": [{**found, "earlier": []} for found, _ in recoveries(run.ancestry.report)],
        "commit": run.sparse.commit,
        "teacher": options.teacher,
        "options": {**options.as_dict(), **{k: fingerprint[k] for k in ("device", "dtype", "processes")}},
        "source_files": fingerprint["source"],
        "teacher_files": fingerprint["teacher_files"],
        "versions": fingerprint["versions"],
        "tokens_sha256": text.sha256,
        "sources": text.sources,
        "windows": {"trained": windows.trained, "held_out": windows.held},
        "tokens": tokens,
        "epochs": tokens / (windows.trained * options.sequence_length),
        "steps": course.step,
        "kl": {"before": course.before, "after": course.best, "step": course.best_step},
        "curve": course.curve,
        "diverged": course.diverged,
        "seconds": run.phases.seconds,
        "peak_memory": run.phases.peak,
    }
    base: dict[str, Any] = {"options": {}, "weights": [], "tables": [], "seconds": {}, "peak_memory": {}}
    smaller = {"smaller": run.ancestry.smaller} if run.ancestry.smaller else {}
    return {
        **base,
        **run.ancestry.report,
        **smaller,
        "model": options.teacher,
        "commit": run.teacher.commit,
        "out": str(writer.out),
        "warnings": warnings,
        "recovery": recovery,
    }
