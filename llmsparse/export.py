"""Turn a pruned checkpoint into what a runtime loads: the part that every target shares."""

from pathlib import Path
from typing import Any

from llmsparse import export_report, extras, plugins
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.progress import Quiet
from llmsparse.writer import Writer


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "packed",
    values: str | None = None,
    embeddings: str | None = None,
    check: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: Any = None,
) -> dict[str, Any]:
    """Write ``model`` into the new folder ``out`` in ``format``, tensor by tensor; it appears whole or not at all.

    ``values``: how kept weights are stored: ``bf16``, ``fp16``, ``fp32`` (bit for bit), ``int8``, ``int4:32``...;
    default: the codes beside the model where prune or quantize wrote some, else the dtype that they have (gguf,
    openvino: fp16; onnx, executorch: fp32; c-header: int8; compressed-tensors: none, codes are needed).
    ``embeddings``: ``keep``, ``int8``, ``int4:32``...; default: as the codes beside the model, else int8 with integer
    values. gguf takes ``q8_0``, ``q4_0``, ``q4_k`` and ``q6_k`` for both: ggml's own rounding.
    ``check``: measure what was written, in its own runtime where that is installed, beside the source.
    Returns ``bytes``, ``linear``, ``embeddings`` (bytes before and after), ``bits_per_weight``, ``layouts``
    (how many weights each has), ``warnings``, with ``check`` what it found, of c-header the ``device``.

    Raises:
        UserError: no checkpoint, one that is packed or quantised already, an ``out`` that holds something,
            an unknown format or values, weights that are not what the codes beside them say, a check that failed
            (what was written stays, and its export.json says what failed).
    """
    exporter = plugins.load("exporters", format)
    needed = exporter.EXTRA.packages | (exporter.EXTRA.check if check else {})
    extras.require(f"--format {format}{' --check' * check}", exporter.EXTRA, needed)
    if check and hasattr(exporter, "before_check"):  # whether this machine has what the check runs
        exporter.before_check()
    checkpoint = Checkpoint.open(model, revision, token, cache_dir)
    _refuse_quantised(checkpoint, model, trust_remote_code, packed=getattr(exporter, "PACKED", False))
    Writer.check_target(out, overwrite, checkpoint.folder)
    result = exporter.export(
        checkpoint, Path(out), values=values, embeddings=embeddings, overwrite=overwrite,
        trust_remote_code=trust_remote_code, progress=progress or Quiet(),
    )  # fmt: skip
    result = {"model": str(model), "out": str(out), "format": format, **result}
    if check:
        _check(exporter, checkpoint, result, trust_remote_code, progress or Quiet())
    return result


def _check(
    exporter: Any, checkpoint: Checkpoint, result: dict[str, Any], trust_remote_code: bool, progress: Any
) -> None:
    """Add what the exporter's check finds to the result and to export.json."""
    out = Path(result["out"]).expanduser()
    options = {"trust_remote_code": trust_remote_code, "progress": progress}
    result["check"] = exporter.check(checkpoint, out, result, **options)
    export_report.write(out, result)
    if failed := result["check"]["failed"]:
        raise UserError(
            f"{out} is written, but its check failed: {'; '.join(failed)}. See {out / export_report.NAME}"
        )


def _refuse_quantised(
    checkpoint: Checkpoint, model: str | Path, trust_remote_code: bool, packed: bool
) -> None:
    """``packed``: whether the target takes packed folders."""
    quantised = getattr(checkpoint.config(trust_remote_code), "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method == "llmsparse" and packed:
        return
    if method == "llmsparse":
        raise UserError(
            f"{model} is packed already; export the folder that prune wrote, or unpack it with --format dense first"
        )
    raise UserError(f"{model} is quantised ({method}); export an unquantised checkpoint")
