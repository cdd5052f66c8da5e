"""A causal language model as an OpenVINO graph that keeps its keys and values between calls."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "beam_idx",
)  # as optimum-intel and OpenVINO GenAI name them
BEFORE, TOKENS = 3, 2  # of the traced call: neither is 1, which transformers treats in its own way


class Past:
    """Keys and values as transformers asks a cache for them; all of them are kept, whatever a block's window is."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = (
            tensors  # keys, values of the first block, of the second...: (1, heads, tokens, head size)
        )
        self.length = tensors[0].shape[2]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        return self.length + query_length, 0

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        for place, new in ((2 * layer_idx, keys), (2 * layer_idx + 1, values)):
            self.tensors[place] = torch.cat([self.tensors[place], new], dim=2)
        return self.tensors[2 * layer_idx], self.tensors[2 * layer_idx + 1]


class Explicit(nn.Module):
    """The model with its keys and values as inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = Past([tensor.index_select(0, beam_idx) for tensor in past])
        logits = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
        return logits, *cache.tensors


def stateful(model: Any) -> Any:
    """An ``openvino.Model`` of one sequence: ``INPUTS`` in, ``logits`` (1, tokens, vocabulary) out.

    Its constants share the memory of ``model``, which must outlive it; each has the name of its parameter.
    """
    from openvino import PartialShape
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, count = config.num_key_value_heads, config.num_hidden_layers
    graph = _traced(model, [torch.zeros(1, heads, BEFORE, head) for _ in range(2 * count)])
    states = [f"{i}.{part}" for i in range(count) for part in ("key", "value")]
    before, after = ([f"{kind}.{state}" for state in states] for kind in ("past_key_values", "present"))
    for port, name in zip(graph.inputs, (*INPUTS, *before), strict=True):
        shape = [1, heads, -1, head] if name in before else [1] if name == "beam_idx" else [1, -1]
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(PartialShape(shape))
        port.get_tensor().set_names({name})
    for port, name in zip(graph.outputs, ("logits", *after), strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(before, after, strict=True)))
    _begin_empty(graph, (1, heads, 0, head))
    for node in graph.get_ops():
        if node.get_type_name() == "Constant":
            node.set_friendly_name(node.get_friendly_name().removeprefix("self.model."))
    return graph


@torch.inference_mode(False)
@torch.no_grad()
def _traced(model: Any, past: list[Tensor]) -> Any:
    """By OpenVINO's front end itself: its convert_model would send a report of the conversion to its makers."""
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    ids = torch.ones(1, TOKENS, dtype=torch.int64)
    mask = torch.ones(1, BEFORE + TOKENS, dtype=torch.int64)
    places = torch.arange(BEFORE, BEFORE + TOKENS)[None]
    example = (ids, mask, places, torch.zeros(1, dtype=torch.int32), *past)
    with warnings.catch_warnings():
        # what is constant in the trace is in every call; the rest comes from OpenVINO's look at each attribute
        for category in (torch.jit.TracerWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        decoder = TorchScriptPythonDecoder(
            Explicit(model), example_input=example
        )  # the front end holds it weakly
        front = FrontEndManager().load_by_framework("pytorch")
        graph = front.convert(front.load(decoder))
    apply_moc_transformations(graph, cf=False, smart_reshape=False)
    return graph


def _begin_empty(graph: Any, shape: tuple[int, ...]) -> None:
    """Say what a state is at first; without it the CPU plugin refuses to join states and attention."""
    from openvino import opset13 as ops

    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            empty = ops.broadcast(np.float32(0), np.array(shape, np.int64))
            node.set_arguments([empty.output(0)])
    graph.validate_nodes_and_infer_types()
