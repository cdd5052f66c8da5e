"""How weights lie on a GPU, and which product takes how many tokens: timed once, remembered, followed, and told."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse import __version__, gpu
from llmsparse.atomic import write_whole
from llmsparse.errors import UserError, first_line
from llmsparse.gguf_checkpoint import cache_folder
from llmsparse.gpu import BUCKETS, CUSPARSELT, Layer
from llmsparse.packed import Packed
from llmsparse.sparse_linear import SparseLinear

PRODUCTS = "LLMSPARSE_PRODUCTS"
WAYS = ("measured", "packed", "dense")
STORAGE = "LLMSPARSE_STORAGE"
STORAGES = {
    "decode": "the kernels' layout alone; prompts are multiplied by a weight that is unpacked for each product",
    "prefill": "what multiplies prompts fastest alone: cuSPARSELt's layout of 2:4 weights, others dense",
    "both": "the kernels' layout for few tokens, and what multiplies prompts fastest beside it",
}
LONG = (512, 1024, 4096)  # tokens by which products are judged that are for prompts alone
COPIES = 64  # weights of a kind that are timed in turn at the most
ROUNDS, CALLS = 5, 4
WARM = 0.02  # seconds until a GPU's clock has risen
EVEN = 1.05  # a kernel that comes earlier in the list is kept unless another is faster by more
LOG = logging.getLogger("llmsparse")


def asked(variable: str, known: Iterable[str]) -> str:
    """What an environment variable says, or the first of what it may say.

    Raises:
        UserError: it says something else.
    """
    names = list(known)
    found = os.environ.get(variable) or names[0]
    if found not in names:
        raise UserError(f"{variable}={found} is unknown; use {', '.join(names)}")
    return found


def lay_out(modules: list[SparseLinear]) -> None:
    """Give packed layers their layouts at their ``place``, a GPU, kind by kind.

    ``LLMSPARSE_STORAGE`` says for which products; ``LLMSPARSE_PRODUCTS`` whether they are timed (``measured``), or all
    are ``packed`` or ``dense``.

    Raises:
        UserError: a variable says something else.
    """
    kinds: dict[str, list[SparseLinear]] = {}
    for module in modules:
        kinds.setdefault(_signature(module), []).append(module)
    taken: dict[str, int] = {}
    for signature, members in kinds.items():
        with gpu.on(members[0].place):
            chosen = _choose(signature, members)
        for module in members:
            with gpu.on(module.place):
                layer = _layer(module, chosen)
            kind = layer.kernel or layer.prefill or "dense"
            taken[kind] = taken.get(kind, 0) + layer.bytes
            module.put(layer)
    dense = sum(m.packed.shape[0] * m.packed.shape[1] * m.dtype.itemsize for m in modules)
    parts = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in taken.items())
    if modules:
        LOG.info("storage %s: %s on the GPU, dense %.1f MiB", _storage(), parts, dense / 2**20)


def _storage() -> str:
    return asked(STORAGE, STORAGES)


def _signature(module: SparseLinear) -> str:
    """What the fastest way depends on: storage, pattern, values, shape, share of zeros, dtype, device, versions."""
    packed, dtype, device = module.packed, module.dtype, module.place
    rows, columns = packed.shape
    zeros = 1 - packed.nnz / (rows * columns) if packed.nnz >= 0 else 0.0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = (
        _storage(), packed.layout, packed.pattern or "any pattern", packed.values, f"{rows}x{columns}",
        f"{round(zeros * 20) * 5}% zeros", str(dtype).removeprefix("torch."), name, f"torch {torch.__version__}",
        f"triton {_triton()}", f"llmsparse {__version__}",
    )  # fmt: skip
    return ", ".join(facts)


def _triton() -> str:
    if gpu.why_no_kernels() is not None:
        return "absent"
    import triton

    return triton.__version__


class Choice(NamedTuple):
    """What one kind of layer takes: ``Layer`` has the fields; ``why`` is for the log.

    ``complete``: nothing failed while it was found, so that it may be remembered.
    """

    kernel: str | None
    prefill: str | None
    ways: dict[int, tuple[str, int]] = {}
    why: str = ""
    complete: bool = True


def _choose(signature: str, members: list[SparseLinear]) -> Choice:
    """What a kind of layer takes: remembered, or found now."""
    way = asked(PRODUCTS, WAYS)
    if way == "dense":
        return _dense("asked for")
    if (reason := gpu.why_no_kernels()) is not None:
        LOG.warning("weights stay dense on the GPU: %s", reason)
        return _dense(reason)
    if way == "packed":
        return _untimed(members[0])
    file = cache_folder() / "gpu_products.json"
    known = _read(file)
    chosen = known.get(signature)
    packed, numbers, _ = members[0].weight_for_kernels()
    if chosen is None or _refusals(packed, numbers, members[0].dtype, chosen):
        chosen = _timed(members)
        if chosen.complete:
            known = {**_read(file), signature: chosen}
            with suppress(OSError):  # a home that cannot be written to: timed again the next time
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps({k: _stored(choice) for k, choice in known.items()}, indent=1))
    say = LOG.info if chosen.kernel or chosen.prefill == CUSPARSELT else LOG.warning
    say("%s: %s", signature, chosen.why)
    return chosen


def _timed(members: list[SparseLinear]) -> Choice:
    """``_measured``, or, where not even the dense product could be timed, ``_untimed``."""
    here = [member for member in members if member.place == members[0].place]
    copies = _copies(here[0])
    try:
        return _measured((here * copies)[:copies])
    except Exception as error:  # no memory for so many, a graph that another thread spoils...
        LOG.warning("%s is not timed: %s: %s", here[0].path, type(error).__name__, first_line(error))
        return _untimed(here[0])._replace(complete=False)


def _copies(module: SparseLinear) -> int:
    """How many weights exceed twice the L2 cache, so that they come from memory as they do in a decoder."""
    if module.place.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(module.place).L2_cache_size
    return max(1, min(COPIES, -(-2 * cache // module.packed.bytes)))


def _dense(why: str) -> Choice:
    return Choice(None, "dense", dict.fromkeys(BUCKETS, ("prefill", 0)), why)


def _alone(name: str) -> tuple[Choice, str]:
    """The layout of one kernel, and the way in which it multiplies."""
    return (Choice(None, name), "prefill") if name == CUSPARSELT else (Choice(name, None), "kernel")


def _held(module: SparseLinear) -> tuple[list[str], str]:
    """The kernels that are asked for and can hold a weight, and why others cannot."""
    packed, numbers, _ = module.weight_for_kernels()
    names = (CUSPARSELT,) if _storage() == "prefill" else gpu.KERNELS
    found = {name: gpu.why_not(name, packed, numbers, module.dtype) for name in names}
    return [name for name in names if found[name] is None], "; ".join(
        f"{n}: {w}" for n, w in found.items() if w
    )


def _prefill(module: SparseLinear) -> str | None:
    """What is held for prompts beside a kernel's layout."""
    if _storage() == "decode":
        return None
    packed, numbers, _ = module.weight_for_kernels()
    return CUSPARSELT if gpu.why_not(CUSPARSELT, packed, numbers, module.dtype) is None else "dense"


def _untimed(module: SparseLinear) -> Choice:
    """The first kernel that can hold the weight, for as many tokens as it takes at once."""
    names, refused = _held(module)
    if not names:
        LOG.warning("%s stays dense: %s", module.path, refused)
        return _dense(refused)
    choice, way = _alone(names[0])
    prefill = choice.prefill or _prefill(module)
    most = gpu.max_tokens(names[0]) // gpu.REPEATS if choice.kernel else 0
    ways = {tokens: (way if tokens <= most else "prefill" if prefill else "unpack", 0) for tokens in BUCKETS}
    return Choice(choice.kernel, prefill, ways, f"{names[0]}, not timed")


def _measured(modules: list[SparseLinear]) -> Choice:
    """The fastest kernel, with one token or with long inputs, or dense where that is faster; then each bucket's way."""
    names, refused = _held(modules[0])
    judged = LONG if _storage() == "prefill" else (1,)
    alone, complete = {}, True
    for name in names:
        choice, way = _alone(name)
        try:
            layers = [_layer(module, choice) for module in modules]
            alone[name] = sum(
                _seconds(layers, way, tokens, _algorithm(layers[0], tokens)) for tokens in judged
            )
        except Exception as error:  # whatever a compiler or a driver raises: the next kernel takes over
            LOG.warning("%s is not used: %s: %s", name, type(error).__name__, first_line(error))
            complete = False
    plain = [_layer(module, _dense("")) for module in modules]
    dense = sum(_seconds(plain, "prefill", tokens) for tokens in judged)
    told = ", ".join(f"{name} {1e6 * took:.1f} µs" for name, took in {**alone, "dense": dense}.items())
    fastest = min(alone.values(), default=float("inf"))
    if dense < fastest:
        return _dense(f"stays dense ({told}{'; ' * bool(refused)}{refused})")._replace(complete=complete)
    best = next(name for name in alone if alone[name] <= EVEN * fastest)
    choice, _ = _alone(best)
    choice = choice._replace(prefill=choice.prefill or _prefill(modules[0]))
    ways, all_timed = _ways([_layer(module, choice) for module in modules])
    uses = ", ".join(f"{tokens}: {way}" for tokens, (way, _) in ways.items())
    return Choice(choice.kernel, choice.prefill, ways, f"{told}; by tokens: {uses}", complete and all_timed)


def _ways(layers: list[Layer]) -> tuple[dict[int, tuple[str, int]], bool]:
    """The fastest way for each number of tokens, with cuSPARSELt's algorithm; whether all could be timed."""
    first, found, complete = layers[0], {}, True
    for tokens in BUCKETS:
        ways = ["prefill"] if first.prefill else []
        if first.kernel is not None:
            ways = [*ways, "unpack", *(["kernel"] if tokens <= gpu.max_tokens(first.kernel) else [])]
        times, algorithm = {}, 0
        try:
            algorithm = _algorithm(first, tokens)
            times = {way: _seconds(layers, way, tokens, algorithm) for way in ways}
        except Exception as error:  # no memory for so many tokens, most likely: what needs the least of it
            LOG.warning("%d tokens are not timed: %s: %s", tokens, type(error).__name__, first_line(error))
            complete = False
        found[tokens] = (min(times, key=times.__getitem__) if times else ways[0]), algorithm
    return found, complete


def _algorithm(layer: Layer, tokens: int) -> int:
    """cuSPARSELt's fastest for so many tokens; 0 where it is not used."""
    return gpu.search(layer, _random(layer, tokens)) if layer.prefill == CUSPARSELT else 0


def _refusals(packed: Packed, numbers: Tensor, dtype: torch.dtype, choice: Choice) -> str:
    """Why a weight cannot be held as chosen; empty where it can."""
    names = [name for name in (choice.kernel, choice.prefill) if name and name != "dense"]
    reasons = {name: gpu.why_not(name, packed, numbers, dtype) for name in names}
    return "; ".join(f"{name}: {why}" for name, why in reasons.items() if why is not None)


def _layer(module: SparseLinear, choice: Choice) -> Layer:
    """A module's weight in the layouts that were chosen for its kind; dense where it cannot be held so."""
    packed, numbers, scales = module.weight_for_kernels()
    if refused := _refusals(packed, numbers, module.dtype, choice):
        LOG.warning("%s stays dense: %s", module.path, refused)
        choice = _dense(refused)
    tensors = gpu.pack(choice.kernel, packed, numbers, scales) if choice.kernel else ()
    count = len(tensors)
    if choice.prefill == CUSPARSELT:
        tensors = (*tensors, *gpu.pack(CUSPARSELT, packed, numbers, scales))
    elif choice.prefill == "dense":
        tensors = (*tensors, packed.kind.weight(numbers, scales, module.dtype))
    return Layer(packed, module.dtype, choice.kernel, choice.prefill, tensors, count, choice.ways)


def _random(layer: Layer, tokens: int) -> Tensor:
    return torch.randn(tokens, layer.packed.shape[1], device=layer.tensors[0].device).to(layer.dtype)


def _seconds(layers: list[Layer], way: str, tokens: int, algorithm: int = 0) -> float:
    """Of one product: the layers in turn, several times; the smallest of several rounds."""
    x = _random(layers[0], tokens)

    def all_of_them() -> None:
        for _ in range(CALLS):
            for layer in layers:
                layer.by(way, x, algorithm)

    run = _timer(all_of_them, x.device)
    return min(run() for _ in range(ROUNDS)) / (CALLS * len(layers))


def _timer(work: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """Seconds that ``work`` takes: on a GPU those of a CUDA graph of it, without the time of its launches."""
    work()
    if device.type != "cuda":

        def clock() -> float:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun

        return clock
    graph, begin, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        work()

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000

    warm = time.perf_counter() + WARM
    while time.perf_counter() < warm:
        replay()
    return replay


def remembered() -> dict[str, str]:
    """For every kind of layer on the GPUs of this machine what was found."""
    return {key: choice.why for key, choice in _read(cache_folder() / "gpu_products.json").items()}


def _read(file: Path) -> dict[str, Choice]:
    """What was remembered; what someone broke is left out."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    choices = {key: _parsed(value) for key, value in found.items()} if isinstance(found, dict) else {}
    return {key: choice for key, choice in choices.items() if choice is not None}


def _stored(choice: Choice) -> dict[str, Any]:
    return {"kernel": choice.kernel, "prefill": choice.prefill, "ways": choice.ways, "why": choice.why}


def _parsed(value: Any) -> Choice | None:
    try:
        ways = {int(tokens): (str(way), int(algorithm)) for tokens, (way, algorithm) in value["ways"].items()}
        choice = Choice(value["kernel"], value["prefill"], ways, str(value["why"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    held = ({"kernel", "unpack"} if choice.kernel else set()) | ({"prefill"} if choice.prefill else set())
    known = choice.kernel in (None, *gpu.KERNELS) and choice.prefill in (None, "dense", CUSPARSELT)
    complete = set(ways) == set(BUCKETS) and {way for way, _ in ways.values()} <= held
    return choice if known and complete else None
