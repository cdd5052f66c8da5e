"""The float graph of a checkpoint, by onnxruntime-genai's model builder, which is quiet here."""

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmsparse import onnx_layout
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.heap import return_freed_memory

FILE = "model.onnx"
OPTIONS = [  # a node for each layer, whose codes stay its own; caches that a second prompt may follow
    "fuse_qkv=false",
    "windowed_kv_cache=false",
]


def build(checkpoint: Checkpoint, out: Path, work: Path) -> None:
    """Write ``model.onnx`` and its data, genai_config.json and the tokenizer into ``out``: fp32, for CPUs.

    ``work``: a folder for what is needed meanwhile. The model is in memory once, in float32.

    Raises:
        UserError: the builder fails.
    """
    source = _in_float32(checkpoint, work / "source")
    with _quiet(), _builder() as builder:
        try:
            places = str(source), str(source), str(out), "fp32", "cpu", str(work / "cache")
            options = builder.parse_extra_options(*places, OPTIONS)
            onnx_layout.adapt(options["hf_details"]["hf_config"])
            builder.create_model(*places, **options)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"onnxruntime-genai's model builder fails on {checkpoint.folder}: {said}"
            ) from error
    return_freed_memory()


def _in_float32(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder of links to the checkpoint's files whose config says float32: what the builder adds is then exact."""
    folder.mkdir(parents=True)
    for file in checkpoint.folder.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint.folder / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")
    return folder


@contextlib.contextmanager
def _builder() -> Iterator:
    """The builder's module; the folder that it adds to Python's path is taken out again."""
    before = list(sys.path)
    try:
        from onnxruntime_genai.models import builder

        yield builder
    except ImportError as error:
        raise UserError(
            f"onnxruntime-genai's model builder cannot be loaded: {error}; pip install -U 'llmsparse[onnx]'"
        ) from error
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal: it prints each layer and each tensor."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
