"""What onnxruntime-genai's model builder makes of a checkpoint: which it knows, and whose weight each node multiplies."""

import re
from typing import Any, NamedTuple

from llmsparse.errors import UserError

ROTARY = {  # config.json's model_type -> kinds of rotary embeddings that were run, and are what transformers computes
    "llama": {"default", "llama3"},
    "mistral": {"default"},
    "qwen2": {"default"},
    "qwen3": {"default"},
    "gemma3_text": {"default"},
    "phi3": {"default"},
}
HEAD_SIZE = 16  # of which GroupQueryAttention wants a multiple on CPUs
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul\w*")
PARTS = {"attn": "self_attn", "mlp": "mlp"}


class Piece(NamedTuple):
    """Rows of a linear layer's weight."""

    path: str  # the module's
    rows: slice = slice(None)


def check(config: Any) -> None:
    """UserError where the builder would refuse the model, or build one that computes something else."""
    kind = config.model_type
    if kind not in ROTARY:
        raise UserError(
            f"{kind} cannot be exported to ONNX; known: {', '.join(ROTARY)}. onnxruntime-genai's own model builder "
            "knows more"
        )
    for rotary in rotaries(config):
        if rotary["rope_type"] not in ROTARY[kind]:
            raise UserError(
                f"{kind} with rotary embeddings of type {rotary['rope_type']} cannot be exported to ONNX; "
                f"known of it: {', '.join(sorted(ROTARY[kind]))}"
            )
    size = head_size(config)
    if size % HEAD_SIZE:
        raise UserError(
            f"onnxruntime's attention wants heads of a multiple of {HEAD_SIZE} numbers; this model's have {size}"
        )


def rotaries(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters: one, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    return [found] if "rope_type" in found else list(found.values())


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def adapt(config: Any) -> None:
    """Give the builder, written for older versions of transformers, the names that it looks for."""
    if config.model_type == "gemma3_text":
        rotary = config.rope_parameters
        config.rope_local_base_freq = rotary["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(rotary["full_attention"])
    if config.model_type == "phi3":  # else it looks for two sets of rotary embeddings
        config.original_max_position_embeddings = config.max_position_embeddings
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def piece(node: str, config: Any) -> Piece | None:
    """Whose weight the matrix product of this name multiplies by; None where it is no layer's."""
    if node.startswith("/lm_head/MatMul"):
        return Piece(HEAD)
    match = NODE.fullmatch(node)
    if match is None:
        return None
    place = f"model.layers.{match[1]}.{PARTS[match[2]]}"
    return _joined(place, match[3], config) if config.model_type == "phi3" else Piece(f"{place}.{match[3]}")


def _joined(place: str, name: str, config: Any) -> Piece:
    """Phi-3 has queries, keys and values in one matrix, gate and up in another; the graph has them apart."""
    queries = config.num_attention_heads * head_size(config)
    keys, inner = config.num_key_value_heads * head_size(config), config.intermediate_size
    rows = {
        "q_proj": ("qkv_proj", 0, queries),
        "k_proj": ("qkv_proj", queries, queries + keys),
        "v_proj": ("qkv_proj", queries + keys, queries + 2 * keys),
        "gate_proj": ("gate_up_proj", 0, inner),
        "up_proj": ("gate_up_proj", inner, 2 * inner),
    }
    if name not in rows:
        return Piece(f"{place}.{name}")
    joined, first, last = rows[name]
    return Piece(f"{place}.{joined}", slice(first, last))
