"""Packed checkpoints in transformers: ``from_pretrained`` and ``save_pretrained`` without a dense copy."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmsparse import choice, held, packed_embedding
from llmsparse.checkpoint import SAFETENSORS_DTYPES
from llmsparse.errors import UserError, first_line
from llmsparse.packed import VERSION, Packed
from llmsparse.packed_embedding import PackedHead
from llmsparse.sparse_linear import SparseLinear

METHOD = "llmsparse"
REFUSALS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError,
)  # fmt: skip


def register() -> None:
    """Tell transformers of the method ``llmsparse``; again is no harm."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PackedQuantizer)


def load(model: str | Path, **options: Any) -> Any:
    """A packed folder or hub id as a transformers model; ``options`` are those of ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded; the message says what is wrong, and with which tensor.
    """
    from transformers import AutoModelForCausalLM

    register()
    asked = options.pop("output_loading_info", False)
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **options)
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(f"{model} cannot be loaded: {first_line(error)}") from error
    loaded, info = both
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{model} lacks {len(missing)} weights, such as {missing[0]}; the checkpoint is incomplete, get it again"
        )
    return (loaded, info) if asked else loaded


class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint: docs/format.md."""

    quant_method = METHOD  # type: ignore[assignment]

    def __init__(self, version: Any = None, weights: Any = None, **_: Any) -> None:
        if version != VERSION or isinstance(version, bool):
            raise UserError(
                f"config.json: packed format version {version!r} is unknown, this llmsparse reads {VERSION}; "
                "update llmsparse, or export the model again"
            )
        if not isinstance(weights, dict):
            raise UserError(f"config.json: quantization_config.weights is {weights!r}; an object is needed")
        self.packed = {name: Packed.parse(name, entry) for name, entry in weights.items()}

    def to_dict(self) -> dict[str, Any]:
        weights = {name: packed.entry() for name, packed in self.packed.items()}
        return {"quant_method": METHOD, "version": VERSION, "weights": weights}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class PackedQuantizer(HfQuantizer):
    """Puts packed modules in the place of dense ones before weights are read, and checks them after."""

    requires_calibration = True  # transformers' word for: only checkpoints that are packed already

    @property
    def packed(self) -> dict[str, Packed]:
        return self.quantization_config.packed  # type: ignore[attr-defined]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **_: Any
    ) -> None:
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.untied = untie(model, self.packed)
        for path, packed in self.packed.items():
            _replace(model, path, packed)
        if checkpoint_files:
            check_headers(model, self.packed, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        _cast(model, self.dtypes)
        for path in self.packed:
            held.ready(model.get_submodule(path), path)
        for head in (module for module in model.modules() if isinstance(module, PackedHead)):
            held.multiplied(head.table)
        layers = [model.get_submodule(path) for path in self.packed]
        linear = [layer for layer in layers if isinstance(layer, SparseLinear)]
        choice.choose(linear, untimed=model.get_output_embeddings())

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype  # a saved config has its name
        for path, packed in self.packed.items():
            module = model.get_submodule(path)
            if isinstance(module, SparseLinear):
                model.set_submodule(path, module.unpack(dtype))
                continue
            table = packed_embedding.unpack(module, dtype)
            for follower in packed.tied:
                model.set_submodule(follower, _tied_linear(table, model.get_submodule(follower).bias))
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **self.untied}
        model.__dict__.pop("_tied_weights_keys", None)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _cast(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Ordinary parameters in the dtype that was asked for: transformers 5.17 leaves those as stored that it renames."""
    keeps = any(getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict"))
    for name, parameter in model.named_parameters():
        kept = keeps and parameter.dtype == torch.float32
        if name in dtypes and parameter.dtype != dtypes[name] and not kept:
            parameter.data = parameter.data.to(dtypes[name])


def untie(model: Any, weights: dict[str, Packed]) -> dict[str, str]:
    """Take the packed tables out of transformers' tying, which needs parameters; returns what was taken out.

    Raises:
        UserError: the model ties a packed table to a module that its entry does not name.
    """
    tables = {name: {path, *packed.tied} for path, packed in weights.items() for name in (path, *packed.tied)}
    taken = {}
    for follower, leader in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        ends = {follower.removesuffix(".weight"), leader.removesuffix(".weight")}
        if not ends & set(tables):
            continue
        if not any(ends <= table for table in tables.values()):
            raise UserError(
                f"config.json: {type(model).__name__} ties {follower} to {leader}, but the packed weights name "
                "only one of them; export the model again"
            )
        taken[follower] = leader
    if taken:
        left = {k: v for k, v in model.all_tied_weights_keys.items() if k not in taken}
        model.all_tied_weights_keys = left
        model._tied_weights_keys = dict(left)
    return taken


def _replace(model: Any, path: str, packed: Packed) -> None:
    module = _module(model, path)
    if isinstance(module, nn.Embedding):
        _check_shape(path, packed, module.weight.shape)
        if packed.layout != "dense" or not packed_embedding.can_pack(type(module)):
            raise UserError(
                f"config.json: {path} is a {type(module).__name__}; layout {packed.layout} cannot be used there"
            )
        table = packed_embedding.pack(module, packed)
        for follower in packed.tied:
            head = _module(model, follower)
            if type(head) is not nn.Linear:
                raise UserError(
                    f"config.json: {follower} is a {type(head).__name__}, which is tied to no table"
                )
            _check_shape(follower, packed, head.weight.shape)
            model.set_submodule(follower, PackedHead(table, head.bias))
        return
    if type(module) not in (nn.Linear, Conv1D) or packed.tied:
        raise UserError(
            f"config.json: {path} is a {type(module).__name__}, which holds no packed weight"
            + (" that is tied" if packed.tied else "")
        )
    transposed, (weight, bias) = type(module) is Conv1D, (module.weight, module.bias)
    assert isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
    _check_shape(path, packed, weight.T.shape if transposed else weight.shape)
    model.set_submodule(path, SparseLinear(packed, weight.dtype, bias, transposed))


def _module(model: Any, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"config.json: {type(model).__name__} has no module {path!r}") from error


def _check_shape(path: str, packed: Packed, shape: Iterable[int]) -> None:
    if packed.shape != tuple(shape):
        raise UserError(
            f"config.json: {path} is packed as {list(packed.shape)}, but the model has {list(shape)}; "
            "the config does not belong to these weights"
        )


def check_headers(model: Any, weights: dict[str, Packed], files: Iterable[str]) -> None:
    """Refuse files in which a packed tensor is missing, or has another dtype or shape than config.json says."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, dict[str, Any]] = {path: {} for path in weights}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise UserError(f"{file} is no safetensors file; packed checkpoints are stored in these only")
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                target, _ = rename_source_key(name, renamings, converters, prefix, wanted)
                path, _, tensor = target.rpartition(".")
                if path in found:
                    part = opened.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    found[path][tensor] = dtype, tuple(part.get_shape())
    for path, packed in weights.items():
        packed.check_shapes(path, found[path])


def _tied_linear(table: nn.Embedding, bias: nn.Parameter | None) -> nn.Linear:
    rows, columns = table.weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = table.weight
    layer.bias = bias  # type: ignore[assignment]
    return layer
