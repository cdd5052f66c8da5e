"""Tiny random checkpoints of every model family that must work, written by transformers itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 128
BOS, EOS, UNK = 0, 1, 2
SPECIAL = ("<s>", "</s>", "<unk>")
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
GATED: dict[str, Any] = {**BASE, "intermediate_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 2}


def _rotary(**options: Any) -> dict[str, Any]:
    return {**GATED, "head_dim": 8, **options}


# Hidden size 32, two or three blocks (both kinds where they alternate); the sliding window is 8 tokens.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GATED),
    "mistral": lambda: MistralConfig(**_rotary(sliding_window=8)),
    "qwen2": lambda: Qwen2Config(**GATED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_rotary()),
    "gemma2": lambda: Gemma2Config(
        **_rotary(sliding_window=8, query_pre_attn_scalar=8),
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_rotary(sliding_window=8, query_pre_attn_scalar=8),
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
    "phi3": lambda: Phi3Config(**GATED),
    "opt": lambda: OPTConfig(
        **{**BASE, "pad_token_id": EOS}, num_hidden_layers=3, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=BOS,
        eos_token_id=EOS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**BASE, intermediate_size=64, num_hidden_layers=3),
    "falcon": lambda: FalconConfig(
        **BASE, num_hidden_layers=3, multi_query=True, parallel_attn=True, alibi=False, bias=False
    ),
    "mixtral": lambda: MixtralConfig(
        **_rotary(num_hidden_layers=2), num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_rotary(num_hidden_layers=2), moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of ``VOCAB`` ids that starts a text with BOS; bytes without an id become UNK."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (not letter.isascii(), letter))
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, "Ġ", "Ċ"))}
    for letter in letters:
        if letter not in vocabulary and len(vocabulary) < VOCAB:
            vocabulary[letter] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )


def save_tiny(
    family: str,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random checkpoint of ``family`` with its tokenizer into ``folder`` and return the folder.

    Matrices have unit gain (1/sqrt(in)) and norms lie near 1, so that every block moves its hidden states.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        _spread(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Redraw every parameter at a scale that keeps hidden states alive; tied parameters are drawn once."""
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(
                torch.randn_like(parameter), alpha=0.1
            )  # norms keep their 1 (gemma: 0), biases their 0
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.normal_()
        else:
            parameter.normal_(std=parameter.shape[-2 if name in conv1d else -1] ** -0.5)
