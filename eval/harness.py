"""lm-evaluation-harness's Hugging Face model, sharing a multiple-choice item's prefix between its choices."""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.eval.forward import Forward, forward_of, pieces
from llmsparse.eval.nonfinite import refuse_nan
from llmsparse.eval.packing import Batch, Path, Row, attention_mask, batches, collate, share

Request = tuple[Any, list[int], list[int]]  # (context, continuation) as text, then as token ids
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that a mask keeps apart
Answer = tuple[float, bool]  # log-likelihood of the continuation, and whether it is the greedy one


class SharedPrefixLM(HFLM):
    """``HFLM`` that reads a prefix once for all continuations of it, and takes logits where they are scored.

    Several continuations lie in one row behind their prefix; an attention mask and explicit positions keep
    them apart. The first such row is also computed path by path: a model for which that gives anything else
    (a recurrent one, ALiBi) is run path by path, and ``shares`` is False; so are paths longer than a sliding
    window. ``batch_tokens`` bounds the tokens of a forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int, name: str, progress: Any = None):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.batch_tokens, self.name, self.progress = batch_tokens, name, progress
        self.shares: bool | None = None  # not known yet
        self._forward: Forward | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """The harness's, whose own bar would only count tokenised texts."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        paths = [self._path(number, *request[1:]) for number, request in enumerate(requests)]
        if self._forward is None:
            self._forward = forward_of(self.model, torch.tensor([paths[0].inputs], device=self.device))
        if self.progress is not None and override_bs is None:
            self.progress.start("zero-shot", len(requests))
        answers: dict[int, Answer] = {}
        for rows in self._batches(paths):
            for path, answer in self._answers(collate(rows), masked=rows[0].branches > 1):
                answers[path.number] = answer
                if requests[path.number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[path.number][0], answer)
                if self.progress is not None and override_bs is None:
                    self.progress.advance("zero-shot")
        return [answers[number] for number in range(len(requests))]

    def _path(self, number: int, context: list[int], continuation: list[int]) -> Path:
        """What does not fit the model's positions is cut off from the left, as the harness does."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens cannot be scored by {self.name}, "
                f"which has {self.max_length} positions"
            )
        context = context or [
            self.prefix_token_id
        ]  # a blank one became no token; the harness's for an empty one
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Path(number, tokens[:-1], continuation)

    def _batches(self, paths: list[Path]) -> list[list[Row]]:
        """Rows whose branches a mask keeps apart, and rows that are plain sequences."""
        plain, masked, window = [], [], self._window()
        for row in share(paths, self.batch_tokens):
            fits = max(len(path.inputs) for path in row.paths) <= window
            if row.branches > 1 and fits and self.shares is None:
                self.shares = self._keeps_apart(row)
            if row.branches <= 1:
                plain.append(row)
            elif fits and self.shares:
                masked.append(row)
            else:
                plain += _alone(row.paths)
        return [*batches(masked, self.batch_tokens), *batches(plain, self.batch_tokens)]

    def _window(self) -> int:
        """The longest path on which every layer sees every earlier token."""
        config = self.model.config.get_text_config()
        found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return min(size or self.max_length for size in found)

    def _keeps_apart(self, row: Row) -> bool:
        """Whether the paths of ``row`` score in one row what they score each on its own."""
        if not set(getattr(self.model.config.get_text_config(), "layer_types", None) or ()) <= ATTENTION:
            return False
        try:
            together = self._answers(collate([row]), masked=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        apart = self._answers(collate(_alone(row.paths)), masked=False)
        bound = max(1e-3, 16 * torch.finfo(self.model.dtype).eps)  # nats; errors of rounding add up as a root
        return all(
            abs(one[0] - two[0]) <= bound * len(path.targets) ** 0.5
            for (path, one), (_, two) in zip(together, apart, strict=True)
        )

    def _answers(self, batch: Batch, masked: bool) -> list[tuple[Path, Answer]]:
        assert self._forward is not None
        ids = batch.ids.to(self.device)
        options: dict[str, Tensor] = {}
        if masked:
            mask = attention_mask(batch.branches.to(self.device), self.model.dtype)
            options = {"attention_mask": mask, "position_ids": batch.positions.to(self.device)}
        states = self._forward.states(ids, **options)[batch.rows, batch.columns]  # (targets, hidden)
        targets = batch.targets.to(self.device)
        found = [
            _scores(self._forward.logits(states[span]), targets[span]) for span in pieces(0, len(targets))
        ]
        likelihoods, greedy = (torch.cat(part).cpu() for part in zip(*found, strict=True))
        refuse_nan(likelihoods, self.model, ids, self.name)
        sizes = [len(path.targets) for path in batch.paths]
        return [
            (path, (likelihood.double().sum().item(), bool(right.all())))
            for path, likelihood, right in zip(
                batch.paths, likelihoods.split(sizes), greedy.split(sizes), strict=True
            )
        ]


def _alone(paths: list[Path]) -> list[Row]:
    return [Row(len(path.inputs), [path]) for path in paths]


def _scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and whether it is the likeliest token: (targets,) each."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(1), logits.argmax(1) == targets
