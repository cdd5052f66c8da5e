"""An exported folder in real OpenVINO on the CPU, in a process of its own."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmsparse import runtime_child

EXACT = {  # nothing is rounded but to float32: what the file is worth
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
CHUNK = 256  # tokens whose logits exist at a time


def run(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What OpenVINO answers to ``request``: see ``answer``.

    Raises:
        UserError: it cannot load the file, or ended without an answer.
    """
    return runtime_child.run(__name__, "OpenVINO", file, request)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load ``file`` as OpenVINO itself would have it with one thread and with two, then with ``EXACT``.

    ``ids``, ``first``: windows as ``export_check.request`` has them. ``prompt``: ids to continue greedily for
    ``count`` tokens. Returns ``losses`` (nats, of each window) and ``greedy`` with ``EXACT``, ``own_losses`` with
    OpenVINO's ``settings``, ``load_seconds``, ``tokens_per_second`` by threads.
    """
    found: dict[str, Any] = {"tokens_per_second": {}}
    for threads in runtime_child.THREADS:
        begun = time.perf_counter()
        session = Session(request["file"], {"INFERENCE_NUM_THREADS": str(threads)})
        found.setdefault("load_seconds", time.perf_counter() - begun)
        found["tokens_per_second"][threads] = runtime_child.rate(partial(session.seconds, request["prompt"]))
    found["settings"] = {name: str(session.setting(name)) for name in EXACT}
    found["own_losses"] = _losses(session, request)
    del session
    exact = Session(request["file"], EXACT)
    found["losses"] = _losses(exact, request)
    return found | {"greedy": exact.continued(request["prompt"], request["count"])}


class Session:
    """The model with what it remembers of one text."""

    def __init__(self, file: str, options: dict[str, str]) -> None:
        import openvino

        self._model = openvino.Core().compile_model(file, "CPU", options)
        self._request = self._model.create_infer_request()
        self._read = 0

    def setting(self, name: str) -> Any:
        value = self._model.get_property(name)
        return value.get_type_name() if hasattr(value, "get_type_name") else value

    def restart(self) -> None:
        """Forget the text."""
        self._request.reset_state()
        self._read = 0

    def logits(self, ids: list[int]) -> np.ndarray:
        """Read on; float32 (tokens, vocabulary), good until the next call."""
        end = self._read + len(ids)
        self._request.infer({
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._read, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        })  # fmt: skip
        self._read = end
        return self._request.get_tensor("logits").data[0]

    def continued(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest ``count`` tokens after a prompt."""
        self.restart()
        written = [int(self.logits(prompt)[-1].argmax())]
        while len(written) < count:
            written.append(int(self.logits(written[-1:])[-1].argmax()))
        return written

    def seconds(self, prompt: list[int], count: int) -> float:
        """Of ``count`` greedy tokens after a prompt, whose own pass does not count."""
        self.restart()
        token = int(self.logits(prompt)[-1].argmax())
        begun = time.perf_counter()
        for _ in range(count):
            token = int(self.logits([token])[-1].argmax())
        return time.perf_counter() - begun


def _losses(session: Session, request: dict[str, Any]) -> list[float]:
    """Of each window; it is read in chunks, each with what came before in the state."""
    found = []
    for ids, first in zip(request["ids"], request["first"], strict=True):
        session.restart()
        total = 0.0
        for start in range(0, len(ids) - 1, CHUNK):
            end = min(start + CHUNK, len(ids) - 1)
            logits, scored = session.logits(ids[start:end]), max(first - start, 0)
            total += runtime_child.loss(logits[scored:], ids[start + 1 + scored : end + 1])
        found.append(total)
    return found


if __name__ == "__main__":
    runtime_child.serve(answer)
