"""Forward passes that wait for one another: each stops before a weight that is not settled yet."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOCAL = {  # free of arithmetic: not worth handing to the main thread
    Tensor.size, Tensor.dim, Tensor.view, Tensor.transpose, Tensor.unsqueeze, Tensor.expand, Tensor.permute,
    Tensor.squeeze, Tensor.numel, Tensor.__getitem__, Tensor.chunk, Tensor.split, Tensor.is_floating_point,
}  # fmt: skip


class Gate:
    """The weights that a pass has to wait for, recognised in a matrix product by the memory of its operand.

    Linears, transposed linears and slices of three-dimensional expert parameters need no hook of their own.
    """

    def __init__(self, views: dict[str, Tensor]) -> None:
        self.settled: set[str] = set()
        self._spans = {name: _span(view) for name, view in views.items()}
        self._known: dict[tuple[int, int], list[str]] = {}

    def closed(self, operand: Tensor) -> str | None:
        """The first weight inside ``operand`` that is not settled."""
        start, end = key = _span(operand)
        if key not in self._known:
            self._known[key] = [
                n for n, (first, last) in self._spans.items() if start <= first and last <= end
            ]
        return next((name for name in self._known[key] if name not in self.settled), None)

    def knows(self, name: str) -> bool:
        """Whether passes wait here for the weight of that name."""
        return name in self._spans


class Abandoned(BaseException):
    """Unwinds a pass whose activations are not to be kept."""


class Walk:
    """One forward pass, in a thread that only keeps its place: all arithmetic runs on the main thread.

    ``advance`` lets it run until it is ``finished``, or until it reaches a weight that is not settled; then
    ``waiting`` names the weight and ``inputs`` holds what the weight is about to be multiplied with.
    """

    def __init__(self, forward: Callable[[], Any], gate: Gate) -> None:
        self.forward, self.gate = forward, gate
        self.finished = False
        self.waiting: str | None = None
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None  # what the weight is multiplied with in a twin
        self.output: Any = None
        self._error: BaseException | None = None
        self._request: tuple[Callable, tuple, dict] | None = None
        self._reply: Any = None
        self._abandoned = False
        self._thread: threading.Thread | None = None
        self._go, self._turn = threading.Semaphore(0), threading.Semaphore(0)

    def advance(self) -> None:
        """Run to the next stop; an error of the pass is raised here."""
        self.waiting = self.inputs = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._turn.acquire()
        while self._request is not None:
            function, args, kwargs = self._request
            self._request = None
            try:
                self._reply = function(*args, **kwargs)
            except BaseException as error:
                self._error = error
            del function, args, kwargs  # the pass alone decides how long its activations live
            self._go.release()
            self._turn.acquire()
        if self._error is not None:
            failure, self._error = self._error, None
            raise failure

    def abandon(self) -> None:
        """Forget everything; the next ``advance`` starts the pass anew."""
        self.waiting = self.inputs = None
        if self._thread is not None and not self.finished:
            self._abandoned = True
            self._go.release()
            self._thread.join()
        self._thread, self._abandoned, self.finished = None, False, False
        self._go, self._turn = threading.Semaphore(0), threading.Semaphore(0)

    def _run(self) -> None:
        try:
            with torch.no_grad(), _Stops(self):
                self.output = self.forward()
        except Abandoned:
            return
        except BaseException as error:
            self._error = error
        self.finished = True
        self._turn.release()

    def stop(self, name: str, inputs: Tensor) -> None:
        """In the thread: wait here until the main thread goes on."""
        self.waiting, self.inputs = name, inputs
        self._turn.release()
        self._resume()

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """In the thread: have the main thread compute."""
        self._request = (function, args, kwargs)
        self._turn.release()
        self._resume()
        if self._error is not None:
            failure, self._error = self._error, None
            raise failure
        reply, self._reply = self._reply, None
        return reply

    def _resume(self) -> None:
        self._go.acquire()
        if self._abandoned:
            raise Abandoned


class Twinned:
    """A pass and its ``twin`` through other weights: where both wait for the same one, ``targets`` are the twin's inputs.

    To the outside it is the ``walk``.
    """

    def __init__(self, walk: Walk, twin: Walk) -> None:
        self.walk, self.twin = walk, twin

    def __getattr__(self, name: str) -> Any:
        return getattr(self.walk, name)

    @property
    def targets(self) -> Tensor | None:
        return self.twin.inputs if self.twin.waiting == self.walk.waiting else None

    def advance(self) -> None:
        """Both to their next stop, the twin to the end when the walk is there."""
        self.walk.advance()
        waiting = self.walk.waiting
        if waiting is None or self.twin.gate.knows(waiting):
            while not self.twin.finished and (waiting is None or self.twin.waiting != waiting):
                self.twin.advance()

    def abandon(self) -> None:
        """Forget both."""
        self.walk.abandon()
        self.twin.abandon()


class _Stops(TorchFunctionMode):
    """Sees every torch function of a pass."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self.walk = walk

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs, operand = _operands(function, args, kwargs)
        if inputs is not None and operand is not None:
            while (name := self.walk.gate.closed(operand)) is not None:
                self.walk.stop(name, inputs)
        if function in LOCAL or getattr(function, "__name__", "") == "__get__":
            return function(*args, **kwargs)
        return self.walk.call(function, args, kwargs)


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _operands(function: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(input, weight) of a matrix product, or two Nones."""
    if function is nn.functional.linear:
        return args[0], args[1] if len(args) > 1 else kwargs["weight"]
    if function in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
        return args[0], args[1]
    if function is torch.addmm and len(args) > 2:
        return args[1], args[2]
    return None, None
