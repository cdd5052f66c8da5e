"""A transformers model as ExecuTorch runs it: one token a call, its cache inside, weights as codes where they are codes."""

from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "llmsparse_one_token"
HIDDEN = -1e30  # added to the score of a position that is not attended to
ALTERNATING = ("qwen2", "qwen3", "gemma3_text")  # transformers takes a mask for each kind of layer there


class CodedLinear(nn.Module):
    """A linear layer of int8 codes (out, in) and a scale a row; inputs, products and sums are float32."""

    codes: Tensor
    scales: Tensor  # (out,)
    zero_points: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(len(codes), dtype=torch.int64))
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zero_points, 0, -127, 127, torch.int8
        )
        found = nn.functional.linear(inputs, weight)
        return found if self.bias is None else found + self.bias  # XNNPACK's product with codes takes no bias


class CodedEmbedding(nn.Module):
    """A table of int8 codes (rows, width) and a scale a row."""

    codes: Tensor
    scales: Tensor  # (rows,)

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.embedding_byte(self.codes, self.scales, None, -127, 127, ids)


class OneToken(nn.Module):
    """``model`` with room for ``context`` tokens: a token and its position in, logits of the next one out."""

    positions: Tensor
    seen: Tensor
    hidden: Tensor

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attention)
        model.config._attn_implementation = ATTENTION
        self.model, self.config = model, model.config
        heads = self.config.num_key_value_heads
        width = getattr(self.config, "head_dim", None)
        width = width or self.config.hidden_size // self.config.num_attention_heads
        for layer in range(self.config.num_hidden_layers):
            self.register_buffer(f"keys_{layer}", torch.zeros(heads, width, context))
            self.register_buffer(f"values_{layer}", torch.zeros(heads, context, width))
        self.register_buffer("positions", torch.arange(context))
        self.register_buffer("seen", torch.zeros(context))
        self.register_buffer("hidden", torch.full((context,), HIDDEN))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """``tokens`` (1, 1) int64 at ``input_pos`` (1,) int64, counted from 0; logits (1, 1, vocabulary)."""
        found = self.model(
            input_ids=tokens, position_ids=input_pos[None], attention_mask=self._masks(input_pos),
            past_key_values=_Cache(self, input_pos), use_cache=True,
        )  # fmt: skip
        return found.logits

    def _masks(self, position: Tensor) -> Any:
        """What is added to the scores of all positions: (1, 1, 1, context), or one for each kind of layer."""
        full = self.positions <= position
        window = getattr(self.config, "sliding_window", None)
        near = full if window is None else full & (self.positions > position - window)
        masks = [torch.where(open, self.seen, self.hidden)[None, None, None] for open in (full, near)]
        if self.config.model_type in ALTERNATING:
            return {"full_attention": masks[0], "sliding_attention": masks[1]}
        return masks[1]


class _Cache:
    """Writes new keys and values into the module's buffers; to transformers' models it is a cache."""

    def __init__(self, owner: OneToken, position: Tensor) -> None:
        self.owner, self.position = owner, position

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All that a layer has: keys (heads, width, context), values (1, heads, context, width)."""
        all_keys, all_values = (self.owner.get_buffer(f"{name}_{layer}") for name in ("keys", "values"))
        # index_copy_ alone becomes what the runtime does in place
        all_keys.index_copy_(2, self.position, keys.reshape(*all_keys.shape[:2], 1))
        all_values.index_copy_(1, self.position, values[0])
        return all_keys, all_values


def _attention(
    module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one token, (1, heads, 1, width); the heads that share keys are rows of one product."""
    shared = query.reshape(len(keys), -1, query.shape[-1]) * scaling
    weights = (torch.bmm(shared, keys) + mask[0]).softmax(-1)  # matmul would copy all keys
    return torch.bmm(weights, values).reshape(1, 1, -1, query.shape[-1]), None


def put_codes(model: nn.Module, path: str, codes: Tensor, scales: Tensor) -> None:
    """Codes (out, in) and scales (out, 1) in the place of a linear layer or an embedding of ``model``."""
    codes, scales = _positive(codes, scales)
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    if isinstance(old, nn.Embedding):
        new: nn.Module = CodedEmbedding(codes, scales)
    else:
        bias = dict(old.named_parameters()).get("bias")
        new = CodedLinear(codes, scales, None if bias is None else bias.detach())
    setattr(model.get_submodule(parent), name, new)


def _positive(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with scales (out,) that XNNPACK takes, which are positive: rows below 0 change both signs."""
    row = scales.float().reshape(-1)
    turned = torch.where(row[:, None] < 0, -codes, codes).contiguous()
    return turned, torch.where(row == 0, 1.0, row.abs())  # a row of zeros has scale 0
