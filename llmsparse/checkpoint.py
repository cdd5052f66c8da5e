"""A checkpoint on disk, read lazily, tensor by tensor."""

import json
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsparse.errors import UserError, first_line
from llmsparse.hub import Source
from llmsparse.sha256 import file_sha256

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Checkpoint:
    """Tensors of a Hugging Face folder by name; nothing is read before it is asked for.

    Shapes and dtypes come from the files' headers. ``.bin`` files are opened memory-mapped with
    ``weights_only=True``. ``close`` lets go of the open files (and of their resident pages).
    """

    def __init__(self, folder: Path, headers: dict[str, dict[str, Any]] | None = None) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        if headers is not None:  # file name -> tensor name -> {"dtype", "shape"}; the weights are elsewhere
            self.headers = headers
            self.location = {name: file for file, tensors in headers.items() for name in tensors}
            return
        self.location = _locate(folder)  # tensor name -> file name
        self.headers = {file.name: _header(file) for file in self.files}
        missing = [name for name, file in self.location.items() if name not in self.headers[file]]
        if missing:
            raise UserError(
                f"{folder}: its index names {missing[0]} in {self.location[missing[0]]}, which is not there"
            )

    @classmethod
    def open(
        cls,
        model: str | Path,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        headers_only: bool = False,
    ) -> "Checkpoint":
        """Open a local folder, or download a hub id; with ``headers_only`` everything of it but the weights.

        Raises:
            UserError: neither a folder with a checkpoint nor a hub id that can be reached.
        """
        folder = Path(model).expanduser()
        if folder.is_dir():
            return cls(folder)
        if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
            raise UserError(
                f"{model} is not a folder with a checkpoint; give a hub id (owner/name) or such a folder"
            )
        source = Source(str(model), revision, token, cache_dir)
        found = source.headers() if headers_only else None
        return cls(*found) if found else cls(source.download())

    @property
    def commit(self) -> str | None:
        """The hub's commit that was downloaded; None of a local folder."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return [self.folder / name for name in sorted(set(self.location.values()))]

    def names(self) -> list[str]:
        """All tensor names, file by file."""
        return [
            name
            for file in sorted(self.headers)
            for name in self.headers[file]
            if self.location.get(name) == file
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.headers[self.location[name]][name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return SAFETENSORS_DTYPES[self.headers[self.location[name]][name]["dtype"]]

    def bytes(self, name: str) -> int:
        count = self.dtype(name).itemsize
        for size in self.shape(name):
            count *= size
        return count

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        file = self.location[name]
        if file not in self._open:
            path = self.folder / file
            if path.suffix == ".safetensors":
                self._open[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            else:
                self._open[file] = _load_bin(path)
        opened = self._open[file]
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def close(self) -> None:
        """Close the files; reading again opens them anew."""
        self._stack.close()
        self._open.clear()

    def config(self, trust_remote_code: bool = False) -> Any:
        """The transformers config of this folder."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.folder}: its config.json cannot be used: {first_line(error)}") from error

    def tokenizer(self, trust_remote_code: bool = False) -> Any:
        """The transformers tokenizer of this folder."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"{self.folder} has no tokenizer that transformers can load: {first_line(error)}"
            ) from error

    @property
    def is_packed(self) -> bool:
        """Whether weights are stored as docs/format.md says."""
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        found = config.get("quantization_config") if isinstance(config, dict) else None
        return isinstance(found, dict) and found.get("quant_method") == "llmsparse"

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of most of the floating-point tensors; the scales of packed weights do not count."""
        packed = self.is_packed
        names = [name for name in self.names() if not (packed and name.endswith(".scales"))]
        dtypes = [dtype for name in names if (dtype := self.dtype(name)).is_floating_point]
        return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32

    def sha256(self) -> dict[str, str]:
        """The hash of every weight file and of config.json."""
        return {file.name: file_sha256(file) for file in [*self.files, self.folder / "config.json"]}


def _locate(folder: Path) -> dict[str, str]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a Hugging Face checkpoint folder or a hub id")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            location = json.loads((folder / index).read_text())["weight_map"]
            absent = sorted(file for file in set(location.values()) if not (folder / file).is_file())
            if absent:
                raise UserError(
                    f"{folder}: {index} names {absent[0]}, which is missing; download the checkpoint again"
                )
            return location
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return dict.fromkeys(_header(folder / single), single)
    raise UserError(
        f"{folder} holds no model.safetensors or pytorch_model.bin (nor their index); it has no weights"
    )


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype and shape, in the file's order, without reading weights."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.offset_keys()
                slices = {name: opened.get_slice(name) for name in names}
                return {name: {"dtype": s.get_dtype(), "shape": s.get_shape()} for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is not a readable safetensors file ({error}); download it again"
            ) from error
    tensors = _load_bin(file)
    return {name: {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape)} for name, t in tensors.items()}


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"{file} cannot be read memory-mapped with weights_only=True; convert it to safetensors"
        ) from error
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
