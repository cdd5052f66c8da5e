"""What llama.cpp calls a checkpoint's architecture, its settings and its tensors."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import UserError


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp, and how its tensors differ from transformers'."""

    name: str
    activation: str = "silu"
    paired: bool = False  # rotary pairs lie side by side: the rows of q and k are permuted
    norm_shift: float = 0.0  # transformers multiplies by weight + shift, llama.cpp by the weight


FAMILIES = {  # config.json's model_type -> family
    "llama": Family("llama", paired=True),
    "mistral": Family("llama", paired=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norm_shift=1.0),
}
IGNORED = ("rotary_emb.inv_freq",)  # old checkpoints carry it; it follows from the config


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint goes, and what happens to it on the way."""

    name: str  # in the file
    source: str  # in the checkpoint
    heads: int = 0  # of a q or k projection whose rows are permuted
    shift: float = 0.0

    @property
    def table(self) -> bool:
        return self.name == "token_embd.weight"

    @property
    def head(self) -> bool:
        return self.name == "output.weight"

    def to_file(self, tensor: Tensor) -> Tensor:
        """Rows in llama.cpp's order: (heads, 2, pairs) become (heads, pairs, 2)."""
        return _swapped(tensor, (self.heads, 2, -1)) if self.heads else tensor

    def from_file(self, tensor: Tensor) -> Tensor:
        """The inverse of ``to_file``."""
        if not self.heads:
            return tensor
        return _swapped(tensor, (self.heads, len(tensor) // self.heads // 2, 2))


def _swapped(tensor: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    return tensor.unflatten(0, sizes).transpose(1, 2).reshape(tensor.shape)


def family_of(config: Any) -> Family:
    """The family of a model; UserError where llama.cpp would compute something else than transformers."""
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise UserError(
            f"{config.model_type} cannot be exported to GGUF; known: {', '.join(FAMILIES)}. "
            "llama.cpp's own convert_hf_to_gguf.py knows more"
        )
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != found.activation:
        raise UserError(
            f"llama.cpp computes {found.name} with {found.activation}; this model has {activation}"
        )
    if found.name == "gemma3":
        _check_gemma(config)
    return found


def _check_gemma(config: Any) -> None:
    if config.query_pre_attn_scalar != config.head_dim:
        raise UserError(
            f"llama.cpp divides gemma3's attention by the root of head_dim {config.head_dim}; this model has "
            f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
        )
    for option in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, option, None) is not None:
            raise UserError(f"llama.cpp's gemma3 has no {option}; this model has {getattr(config, option)}")
    _period(config)


def _period(config: Any) -> int:
    """Every how many blocks gemma3 attends to everything: the last of each period does."""
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    period = full[0] + 1 if full else len(config.layer_types) + 1
    if full != list(range(period - 1, len(config.layer_types), period)):
        raise UserError(
            f"llama.cpp wants full attention in every n-th block; this model has it in blocks {full}"
        )
    return period


def places(names: list[str], config: Any, family: Family) -> list[Place]:
    """Where each tensor goes. UserError on a tensor that llama.cpp has no name for."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = []
    for name in names:
        if name.endswith(IGNORED) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # tied: llama.cpp takes the embedding too
        target = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(
                f"llama.cpp's {family.name} has no tensor for {name}; it cannot be exported to GGUF"
            )
        found.append(Place(target, name, _heads(name, config, family), _shift(name, family)))
    return found


def _heads(name: str, config: Any, family: Family) -> int:
    if not family.paired:
        return 0
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(name.split(".")[-2], 0)


def _shift(name: str, family: Family) -> float:
    return family.norm_shift if name.endswith("norm.weight") else 0.0


def settings(config: Any, family: Family) -> dict[str, int | float | str]:
    """The keys under the architecture's name; floats stay floats."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, int | float | str] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
    }
    rope = config.rope_parameters
    if family.name == "gemma3":
        found |= {"attention.sliding_window": config.sliding_window}
        found |= {"attention.sliding_window_pattern": _period(config)}
        found |= {"rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}
        rope = rope["full_attention"]
    return found | _rope(rope)


def _rope(rope: dict[str, Any]) -> dict[str, int | float | str]:
    found: dict[str, int | float | str] = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind not in ("default", "llama3"):  # llama3's is a tensor: rope_factors
        raise UserError(
            f"rotary embeddings of type {kind} cannot be exported to GGUF; known: default, linear, llama3"
        )
    return found


def rope_factors(config: Any) -> Tensor | None:
    """llama3's divisors of the rotary frequencies, float32 (head_dim / 2,); None for other models."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head, 2):
        turns = context * rope["rope_theta"] ** (-i / head) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def differences(config: Any) -> list[str]:
    """What llama.cpp leaves out of a model, in words for the user."""
    window = getattr(config, "sliding_window", None)
    slides = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    if not window or not slides:
        return []
    return [
        f"llama.cpp runs {config.model_type} without its sliding window: beyond {window} tokens its output differs"
    ]
