"""The model without its weights: where its blocks are, and how names on disk become parameters and back."""

import math
import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError

ROUTERS = {"gate", "router", "shared_expert_gate"}  # a mixture's routing linears, never pruned
ATTENTION_OUTPUTS = {"o_proj", "out_proj", "c_proj", "dense", "wo"}


@dataclass(frozen=True)
class Weight:
    """A prunable matrix: its name on disk, its parameter in the model, and its (out, in) orientation."""

    name: str
    source: str  # the disk tensor that holds it
    index: int | None  # its place in a three-dimensional disk tensor
    parameter: str
    out_features: int
    in_features: int
    transposed: bool  # stored (in, out)
    block: int | None  # None: outside every block (lm_head)

    @property
    def expert(self) -> int | None:
        """Its expert's number in a mixture, None for a weight that every token meets."""
        if "experts" not in self.parameter.split("."):
            return None
        match = re.search(r"\.experts\.(\d+)\.", self.name)
        return self.index if match is None else int(match[1])

    @property
    def feeds_attention(self) -> bool:
        """Whether it makes queries, keys or values."""
        parts = self.parameter.split(".")
        inside = any("attn" in part or "attention" in part for part in parts[:-2])
        return inside and parts[-2] not in ATTENTION_OUTPUTS

    def stored(self, tensor: Tensor) -> Tensor:
        """This weight's (out, in) view into its disk tensor."""
        return self.oriented(tensor if self.index is None else tensor[self.index])

    def oriented(self, tensor: Tensor) -> Tensor:
        """A view of ``tensor`` as (out, in), or of an (out, in) tensor as it is stored."""
        return tensor.T if self.transposed else tensor


class Skeleton:
    """A meta-device model of a checkpoint, with real buffers, and the map between its files and its parameters."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
    ):
        from accelerate import init_empty_weights

        config = checkpoint.config(trust_remote_code)
        config.use_cache = False
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # one product per expert, so that each can be observed
        self.checkpoint = checkpoint
        self.config = config
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        except (ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"{checkpoint.folder}: no causal-LM can be built from its config: {error}"
            ) from error
        self.model.eval().requires_grad_(False)
        self.sources = self._map_sources()
        self._rows: dict[
            str, dict[str, tuple[int, int]]
        ] = {}  # of converted parameters, as they are found out

    @cached_property
    def block_path(self) -> str:
        """Name of the module list that holds the decoder blocks."""
        count = getattr(self.config, "num_hidden_layers", None)
        lists = {
            n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count
        }
        outer = [n for n in lists if not any(n != other and n.startswith(other + ".") for other in lists)]
        if len(outer) != 1:
            raise UserError(
                f"{self.config.model_type} cannot be streamed: it needs exactly one list of num_hidden_layers={count} "
                f"decoder blocks, found {outer or 'none'}"
            )
        return outer[0]

    @property
    def tables(self) -> list[str]:
        """Paths of the input embedding and of the output one, where it is a matrix of its own on disk."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        paths = [path for path, module in self.model.named_modules() if any(module is end for end in ends)]
        own = {
            self.sources[f"{path}.weight"][0][0]: path
            for path in reversed(paths)
            if f"{path}.weight" in self.sources
        }
        return list(reversed(own.values()))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.block_path)

    def _map_sources(self) -> dict[str, list[tuple[str, str | None]]]:
        """Parameter name -> the (disk name, converter pattern) pairs that it is made of."""
        transforms = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        wanted = dict(self.model.state_dict(keep_vars=True))
        prefix = self.model.base_model_prefix
        sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for name in sorted(self.checkpoint.names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, wanted)
            if target in wanted:
                sources[target].append((name, pattern))
        for follower, leader in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if follower not in sources and leader in sources:
                sources[follower] = sources[leader]
        self._check_complete(wanted, sources)
        return sources

    def _check_complete(self, wanted: dict[str, Tensor], sources: dict) -> None:
        buffers = {name for name, _ in self.model.named_buffers()}
        missing = [n for n in wanted if n not in sources and n not in buffers]
        if missing:
            raise UserError(
                f"{self.checkpoint.folder}: {len(missing)} parameters of {self.config.model_type} have no tensor in its "
                f"files, the first is {missing[0]}; the checkpoint is incomplete or of another architecture"
            )

    def load(self, parameter: str, dtype: torch.dtype, reader: Any = None) -> Tensor:
        """Read one parameter in ``dtype``, joined from its disk tensors by transformers' own conversion."""
        reader = reader or self.checkpoint
        parts = self.sources[parameter]
        if parts[0][1] is None:
            return reader.tensor(parts[0][0]).to(dtype)
        converter = deepcopy(next(c for c in self._converters if parts[0][1] in c.source_patterns))
        for name, pattern in parts:
            converter.add_tensor(parameter, name, str(pattern), reader.tensor(name).to(dtype))
        converted = converter.convert(parameter, model=self.model, config=self.config)
        tensor = converted[parameter]
        return tensor[0] if isinstance(tensor, list) else tensor

    def materialize(self, prefix: str, dtype: torch.dtype, device: torch.device, reader: Any = None) -> None:
        """Give every meta parameter under ``prefix`` its values."""
        self._fill(self.model.get_submodule(prefix), prefix, dtype, device, reader)

    def materialize_outside(self, root: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """The same for everything in ``root`` but the blocks."""
        prefix = next(name for name, module in self.model.named_modules() if module is root)
        self._fill(root, prefix, dtype, device, None, without=self.blocks)

    def materialize_all(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The whole model with its values; ``release_all`` sends it back."""
        self.materialize_outside(self.model, dtype, device)
        for index in range(len(self.blocks)):
            self.materialize(f"{self.block_path}.{index}", dtype, device)
        self.model.tie_weights()
        self.checkpoint.close()
        return self.model

    def _fill(self, root: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device, reader: Any,
              without: nn.Module | None = None) -> None:  # fmt: skip
        for key, parameter in root._parameters.items():
            name = f"{prefix}.{key}" if prefix else key
            if parameter is not None and parameter.is_meta:
                value = self.load(name, dtype, reader).to(device)
                root._parameters[key] = nn.Parameter(value, requires_grad=False)
        for key, buffer in root._buffers.items():
            if buffer is not None:
                name = f"{prefix}.{key}" if prefix else key
                stored = self.load(name, buffer.dtype, reader) if name in self.sources else buffer
                root._buffers[key] = stored.to(device)
        for key, child in root.named_children():
            if child is not without:
                self._fill(child, f"{prefix}.{key}" if prefix else key, dtype, device, reader, without)

    def release(self, prefix: str) -> None:
        """Send the parameters under ``prefix`` back to the meta device."""
        _to_meta(self.model.get_submodule(prefix), None)

    def release_outside(self, root: nn.Module) -> None:
        """The same for everything in ``root`` but the blocks."""
        _to_meta(root, self.blocks)

    def release_all(self) -> None:
        """Send every parameter back to the meta device."""
        for index in range(len(self.blocks)):
            self.release(f"{self.block_path}.{index}")
        self.release_outside(self.model)

    @cached_property
    def weights(self) -> list[Weight]:
        """Every prunable matrix of the checkpoint, in the model's order."""
        found: list[Weight] = []
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                if self._is_router(path):
                    continue
                parameter = f"{path}.weight"
                found += self._weights_of(parameter, isinstance(module, Conv1D))
            elif "experts" in path.split("."):
                for name, parameter_3d in module.named_parameters(recurse=False):
                    if parameter_3d.dim() == 3:
                        found += self._weights_of(
                            f"{path}.{name}", bool(getattr(module, "is_transposed", False))
                        )
        return found

    def _is_router(self, path: str) -> bool:
        """Routing linears by name, in models whose blocks hold experts (a dense model may call anything a gate)."""
        parts = set(path.split("."))
        return bool(parts & ROUTERS) and "experts" not in parts and self._has_experts

    @cached_property
    def _has_experts(self) -> bool:
        return any("experts" in name.split(".") for name, _ in self.model.named_modules())

    @cached_property
    def unrecognised(self) -> list[str]:
        """Parameters of two or more dimensions in the blocks that are neither linear weights nor routers."""
        known = {w.parameter for w in self.weights}
        blocks = {
            f"{self.block_path}.{name}": p for name, p in self.blocks.named_parameters() if p.dim() >= 2
        }
        return [name for name in blocks if name not in known and not set(name.split(".")) & ROUTERS]

    def same_as(self, name: str) -> list[str]:
        """Other disk tensors that must stay equal to ``name``: a tied pair that the files hold twice."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        pairs = [{part[0] for key in pair for part in self.sources.get(key, [])} for pair in tied.items()]
        return sorted(other for pair in pairs if name in pair for other in pair if other != name)

    def _weights_of(self, parameter: str, transposed: bool) -> list[Weight]:
        match = re.match(rf"{re.escape(self.block_path)}\.(\d+)\.", parameter)
        block = int(match[1]) if match else None
        found = []
        for name, _ in self.sources.get(parameter, []):
            shape = self.checkpoint.shape(name)
            rows, columns = shape[-2:]
            out, inputs = (columns, rows) if transposed else (rows, columns)
            for index in [None] if len(shape) == 2 else range(shape[0]):
                label = name if index is None else f"{name}[{index}]"
                found.append(Weight(label, name, index, parameter, out, inputs, transposed, block))
        return found

    def views(self, weights: list[Weight], of: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Weight name -> an (out, in) view into the materialised parameter, writable in place.

        Or into the tensors of the same shapes that ``of`` has under the parameters' names.
        """
        views: dict[str, Tensor] = {}
        for name in dict.fromkeys(w.parameter for w in weights):
            views.update(self._disk_views(name, of[name] if of else self.model.get_parameter(name).data))
        return {w.name: w.oriented(views[w.name]) for w in weights}

    def _disk_views(self, parameter: str, tensor: Tensor) -> dict[str, Tensor]:
        parts = self.sources[parameter]
        if parts[0][1] is None:
            if tensor.dim() == 2:
                return {parts[0][0]: tensor}
            return {f"{parts[0][0]}[{i}]": tensor[i] for i in range(tensor.shape[0])}
        columns = tensor.shape[-1]
        if parameter not in self._rows:
            self._rows[parameter] = self._rows_of(parameter, tensor.shape[:-1])
        rows = self._rows[parameter].items()
        return {name: tensor.view(-1, columns)[first : last + 1] for name, (first, last) in rows}

    def _rows_of(self, parameter: str, outer: torch.Size) -> dict[str, tuple[int, int]]:
        """Disk name -> the first and the last of a converted parameter's rows that it is."""
        # every row's number, sent the way of the weights
        numbers = torch.arange(math.prod(outer)).view(*outer, 1)
        reverted = revert_weight_conversion(self.model, {parameter: numbers})
        rows = {}
        for name, _ in self.sources[parameter]:
            match = next(
                (r for r in reverted if r == name or r.endswith("." + name) or name.endswith("." + r)), None
            )
            found = reverted[match].flatten() if match else numbers[:0].flatten()
            if len(found) == 0 or not torch.equal(
                found, torch.arange(int(found[0]), int(found[0]) + len(found))
            ):
                raise UserError(
                    f"{self.config.model_type} cannot be streamed: transformers does not say which rows of {parameter} "
                    f"the tensor {name} is"
                )
            rows[name] = int(found[0]), int(found[-1])
        return rows


def _to_meta(root: nn.Module, without: nn.Module | None) -> None:
    for name, parameter in root._parameters.items():
        if parameter is not None and not parameter.is_meta:
            root._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for child in root.children():
        if child is not without:
            _to_meta(child, without)
