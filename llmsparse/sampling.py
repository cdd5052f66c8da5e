"""Calibration text that the model writes itself: tokens drawn one after another from its own distribution."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration import Calibration
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import check_ids, load_model
from llmsparse.heap import return_freed_memory
from llmsparse.processes import Processes

PHASE = "sampling"
HOST, DEVICE = 1 << 15, 1 << 17  # tokens in the caches of windows that are written at once


@dataclass(frozen=True)
class Sampling:
    """Options: ``temperature`` divides the logits; only the ``top_k`` likeliest tokens may come, or any (0)."""

    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"--set self.temperature={self.temperature}: it must be above 0; 1 is the model's own distribution"
            )
        if type(self.top_k) is not int or self.top_k < 0:
            raise UserError(f"--set self.top_k={self.top_k}: it must be a number of tokens, or 0 for any")

    def chances(self, logits: Tensor) -> Tensor:
        """The chance of each token, (windows, vocabulary) float64, given logits of that shape."""
        scores = logits.double() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        return scores.softmax(-1)

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Each window's token, where summed chances pass ``uniform`` (windows,); ``logits``: (windows, vocabulary)."""
        if not bool(torch.isfinite(logits).all()):
            raise UserError("the model cannot write text: its logits are not finite; use --dtype float32")
        summed = self.chances(logits if logits.is_cuda else logits.cpu()).cumsum(-1)  # others lack float64
        passed = uniform.to(summed.device)[:, None] * summed[:, -1:]
        return torch.searchsorted(summed, passed, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Sampler:
    """A whole model that is loaded to write windows, and let go of.

    Each window has random numbers of its own, made on the host: however many are written at once, the same text comes
    out, up to the rounding of the model's products.
    """

    checkpoint: Checkpoint
    options: Sampling
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool
    batch_size: int  # windows written at once; halved when memory runs out
    progress: Any  # a Progress

    def __call__(self, tokenizer: Any, prefix: list[int], count: int, length: int, seed: int) -> Tensor:
        """``count`` windows of ``length`` tokens that follow ``prefix``, (count, length) int64.

        Where the prefix is empty the first token is drawn as the one after EOS, or, of a tokenizer without EOS, uniformly
        from all that are not special. An EOS ends nothing: another text follows it.

        Raises:
            UserError: the model cannot be loaded whole, gives no finite logits, or lacks memory for one window.
        """
        given = prefix or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        check_ids(self.checkpoint, torch.tensor([0, *given]), self.trust_remote_code)
        draws = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(count, length, generator=draws, dtype=torch.float64)
        model = load_model(self.checkpoint, self.dtype, self.device, self.trust_remote_code)
        try:
            with torch.inference_mode():
                if prefix:
                    start = torch.tensor(prefix).expand(count, -1)
                    return self._batches(model, start, uniforms)
                first = self._first(model, tokenizer, uniforms[:, 0])[:, None]
                return torch.cat((first, self._batches(model, first, uniforms[:, 1:])), 1)
        finally:
            del model
            return_freed_memory()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _first(self, model: Any, tokenizer: Any, uniform: Tensor) -> Tensor:
        """The first token of windows that nothing is put in front of."""
        if tokenizer.eos_token_id is not None:
            logits = model(input_ids=torch.tensor([[tokenizer.eos_token_id]], device=self.device)).logits
            return self.options.draw(logits[:, -1].expand(len(uniform), -1), uniform).cpu()
        special = set(tokenizer.all_special_ids)
        size = min(len(tokenizer), model.config.get_text_config().vocab_size)
        plain = torch.tensor([token for token in range(size) if token not in special])
        return plain[(uniform * len(plain)).long()]

    def _batches(self, model: Any, start: Tensor, uniforms: Tensor) -> Tensor:
        """What follows ``start`` (count, any), batch by batch."""
        batch, parts, done = self.batch_size, list[Tensor](), 0
        while done < len(uniforms):
            self.progress.start(PHASE, -(-(len(uniforms) - done) // batch) * uniforms.shape[1])
            try:
                for part in zip(start[done:].split(batch), uniforms[done:].split(batch), strict=True):
                    parts.append(self._follow(model, *part))
                    done += len(parts[-1])
            except torch.OutOfMemoryError:
                batch = min(batch, len(uniforms) - done) // 2
            if not batch:
                raise UserError(
                    "out of memory while the model writes one window; use a shorter --sequence-length, or --device cpu"
                )
        return torch.cat(parts)

    def _follow(self, model: Any, start: Tensor, uniforms: Tensor) -> Tensor:
        """One token after the other, for each window (batch) at once; the cache holds what was read."""
        read, cache, tokens = start.to(self.device), None, list[Tensor]()
        for uniform in uniforms.T:
            output = model(input_ids=read, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise UserError(f"{type(model).__name__} cannot write text token by token: it keeps no cache")
            tokens.append(self.options.draw(output.logits[:, -1], uniform))
            read = tokens[-1][:, None].to(self.device)
            self.progress.advance(PHASE)
        return torch.stack(tokens, 1).cpu()


def sampler_of(job: Any, progress: Any) -> Sampler | None:
    """What writes a run's calibration text; None where no model is to."""
    if job.sampling is None:
        return None
    recipe = job.recipe
    batch = max(1, (HOST if job.device.type == "cpu" else DEVICE) // recipe.sequence_length)
    if recipe.batch_size != "auto":
        batch = int(recipe.batch_size)
    return Sampler(
        job.checkpoint, job.sampling, job.dtype, job.device, recipe.trust_remote_code, batch, progress
    )


def text_of(job: Any, processes: Processes, progress: Any) -> Calibration | None:
    """The calibration windows, the same in every process; where the model writes them, the main one's."""
    if (sampler := sampler_of(job, progress)) is None:
        return processes.together(job.calibrate)
    main = processes.is_main
    return processes.first(processes.together(lambda: job.calibrate(sampler) if main else None))


@dataclass(frozen=True)
class Unwritten:
    """Stands in for a ``Sampler`` in a plan, which loads no weight: zeros."""

    options: Sampling

    def __call__(self, tokenizer: Any, prefix: list[int], count: int, length: int, seed: int) -> Tensor:
        return torch.zeros(count, length, dtype=torch.long)
