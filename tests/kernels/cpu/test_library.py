"""The native kernels equal float64 PyTorch as closely as PyTorch's own, at odd shapes, and refuse what does not fit."""

import ctypes
import mmap
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from llmsparse.kernels.cpu import library
from llmsparse.kernels.cpu.library import Matrix, available, gather, linear, starts, unpack

from .stored import Stored, store

pytestmark = pytest.mark.skipif("native" in available(), reason="the native kernels are not built")

USABLE = [name for name, reason in available().items() if reason is None]
LINEAR_KINDS = ["bf16", "int8", "int4:32", "int4:64", "int4:96", "int4:20"]
KINDS = [*LINEAR_KINDS, "fp16", "fp32"]
SHAPES = [(1, 1), (3, 7), (5, 64), (17, 65), (33, 576), (8, 130), (2, 4097), (4, 1030)]
DTYPES = [torch.float32, torch.bfloat16]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
layouts = pytest.mark.parametrize("masked", [True, False], ids=["bitmask", "dense"])
isas = pytest.mark.parametrize("isa", USABLE)


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def quantised(x: Tensor) -> Tensor:
    """The activations that integer kernels multiply: 8 bits of magnitude, a scale for 64 columns."""
    tokens, columns = x.shape
    padded = torch.zeros(tokens, -(-columns // 64) * 64)
    padded[:, :columns] = x
    blocks = padded.view(tokens, -1, 64)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 255) / largest  # 255 / largest would round twice in torch
    codes = torch.where(largest > 0, (blocks.abs() * inverse + 0.5).floor(), 0.0)
    return (codes.double() * (largest / 255).double() * blocks.sign()).view(tokens, -1)[:, :columns]


def rounding(x: Tensor, dense: Tensor) -> Tensor:
    """What float32 sums of these products may lose: the oracle's own units."""
    return 4e-7 * (x.double().abs() @ dense.abs().T) + 1e-30


@isas
@layouts
@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_bf16_products_are_as_exact_as_torch(
    isa: str, masked: bool, shape: tuple, dtype: torch.dtype
) -> None:
    stored = store("bf16", *shape, masked)
    matrix = stored.matrix()
    for tokens in (1, 3, 8):
        x = inputs(tokens, shape[1], dtype)
        exact = x.double() @ stored.dense.T
        torch_error = (torch.nn.functional.linear(x, stored.dense.to(dtype)) - exact).abs()
        error = (linear(matrix, x, isa) - exact).abs()
        assert (error <= 2 * torch_error.amax() + rounding(x, stored.dense)).all()


@isas
@layouts
@shapes
@pytest.mark.parametrize("kind", [kind for kind in LINEAR_KINDS if kind != "bf16"])
def test_integer_products_are_exact_for_quantised_activations(
    isa: str, masked: bool, shape: tuple, kind: str
) -> None:
    stored = store(kind, *shape, masked)
    matrix = stored.matrix()
    for tokens in (1, 3, 8):
        for dtype in DTYPES:
            x = inputs(tokens, shape[1], dtype)
            y = linear(matrix, x, isa)
            assert ((y - quantised(x.float()) @ stored.dense.T).abs() <= rounding(x, stored.dense)).all()
            # Half a step of 1/255 of its block's largest activation, for each product.
            largest = x.double().abs().amax(1, keepdim=True)
            assert (
                (y - x.double() @ stored.dense.T).abs() <= largest / 509 * stored.dense.abs().sum(1)
            ).all()


@isas
@layouts
@shapes
@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_rows_are_the_weights(isa: str, masked: bool, shape: tuple, kind: str) -> None:
    stored = store(kind, *shape, masked)
    matrix, (rows, _) = stored.matrix(), shape
    chosen = torch.arange(rows).flip(0).repeat(2)
    for dtype in DTYPES:
        wanted = stored.dense.float().to(dtype)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        found = unpack(matrix, 0, rows, dtype, isa)
        assert torch.equal(found.view(bits), wanted.view(bits))  # bits, so that -0.0 is told from 0.0
        assert torch.equal(unpack(matrix, rows // 2, rows, dtype, isa), wanted[rows // 2 :])
        assert torch.equal(gather(matrix, chosen.view(2, -1), dtype, isa), wanted[chosen].view(2, rows, -1))


def test_nans_and_infinities_of_the_weights_are_kept() -> None:
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e-40, 6e-8, -0.0, 1.0]]).to(
            dtype
        )
        matrix = Matrix(kind, (1, 7), special.view(torch.int32 if kind == "fp32" else torch.int16))
        for isa in USABLE:
            assert torch.allclose(unpack(matrix, 0, 1, isa=isa), special.float(), 0, 0, equal_nan=True)
            narrow = unpack(matrix, 0, 1, torch.bfloat16, isa)
            assert torch.allclose(narrow, special.to(torch.bfloat16), 0, 0, equal_nan=True)


@isas
@layouts
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_nan_among_the_activations_stays_in_its_token(isa: str, masked: bool, kind: str) -> None:
    stored = store(kind, 9, 200, masked)
    x = inputs(3, 200, torch.float32)
    clean = linear(stored.matrix(), x, isa)
    for bad in (float("nan"), float("inf")):
        x[1, 150] = bad
        y = linear(stored.matrix(), x, isa)
        assert torch.equal(y[::2], clean[::2])
        assert not y[1, 2::3].isfinite().any()  # full rows


@isas
def test_every_output_is_written(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*size: int, **options: Any) -> Tensor:
        return torch.full(size, float("nan"), **options)

    for kind in LINEAR_KINDS:
        for masked in (True, False):
            matrix = store(kind, 7, 100, masked).matrix()
            with monkeypatch.context() as patched:
                patched.setattr(library.torch, "empty", poisoned)
                assert linear(matrix, inputs(3, 100, torch.float32), isa).isfinite().all()
                assert unpack(matrix, 0, 7, isa=isa).isfinite().all()


@isas
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_thread_counts_give_the_same_bits(isa: str, kind: str) -> None:
    stored = store(kind, 1500, 700, masked=True)
    matrix, x = stored.matrix(), inputs(3, 700, torch.bfloat16)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((linear(matrix, x, isa), unpack(matrix, 0, 1500, isa=isa)))
    torch.set_num_threads(1)
    for y, rows in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(rows, found[0][1])


def test_the_pool_without_openmp_gives_the_same_bits() -> None:
    matrix, x = store("int8", 3000, 700, masked=True).matrix(), inputs(2, 700, torch.float32)
    wanted = linear(matrix, x)
    native = library._library()
    torch.set_num_threads(3)
    try:
        native.use_parallel(None)
        assert all(torch.equal(linear(matrix, x), wanted) for _ in range(50))
    finally:
        native.use_parallel(library._torch_parallel())
        torch.set_num_threads(1)


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    matrix, wide = store("bf16", 5, 64, masked=True).matrix(), inputs(4, 200, torch.float32)
    assert torch.equal(linear(matrix, wide[:, 10:74]), linear(matrix, wide[:, 10:74].contiguous()))


class Guarded:
    """Copies of tensors that end where memory that may not be read begins."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []
        self.libc = ctypes.CDLL(None, use_errno=True)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
        flat = torch.frombuffer(
            memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * mmap.PAGESIZE - size
        )
        flat.copy_(tensor.flatten())
        assert self.libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
        return flat.view(tensor.shape)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded through mprotect")
@layouts
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_beyond_a_buffer(masked: bool, kind: str) -> None:
    for shape in SHAPES:
        guard, stored = Guarded(), store(kind, *shape, masked)
        values, mask, scales = (guard.copy(t) for t in (stored.values, stored.mask, stored.scales))
        assert values is not None
        matrix = Stored(kind, values, mask, scales, stored.dense).matrix()
        x = guard.copy(inputs(3, shape[1], torch.bfloat16))
        assert x is not None
        for isa in USABLE:
            assert torch.equal(unpack(matrix, 0, shape[0], isa=isa), stored.dense.float())
            if matrix.multiplies:
                assert linear(matrix, x, isa).isfinite().all()


def test_starts_are_the_running_sum_of_set_bits() -> None:
    for rows, columns in SHAPES:
        stored = store("int8", rows, columns, masked=True)
        assert stored.mask is not None
        kept = stored.mask.unsqueeze(-1).bitwise_right_shift(torch.arange(8)).bitwise_and(1).sum((1, 2))
        assert starts(stored.mask, columns).tolist() == [0, *kept.cumsum(0).tolist()]
        assert starts(stored.mask, columns, per_byte=2).tolist() == [0, *((kept + 1) // 2).cumsum(0).tolist()]


def test_what_does_not_fit_is_named() -> None:
    stored = store("int8", 4, 20, masked=True)
    assert stored.mask is not None and stored.scales is not None
    garbage = stored.mask.clone()
    garbage[1, -1] |= 0x80
    with pytest.raises(ValueError, match="mask has bits set beyond its 20 columns"):
        Matrix("int8", (4, 20), stored.values, garbage, stored.scales)
    with pytest.raises(ValueError, match="values must hold .* elements"):
        Matrix("int8", (4, 20), stored.values[1:].clone(), stored.mask, stored.scales)
    with pytest.raises(ValueError, match="scales must be"):
        Matrix("int8", (4, 20), stored.values, stored.mask, stored.scales[:3])
    with pytest.raises(ValueError, match="need scales"):
        Matrix("int8", (4, 20), stored.values, stored.mask)
    with pytest.raises(ValueError, match="values must be torch.int8"):
        Matrix("int8", (4, 20), stored.values.short(), stored.mask, stored.scales)
    with pytest.raises(ValueError, match="values int4 are unknown"):
        Matrix("int4", (4, 20), stored.values, stored.mask, stored.scales)
    matrix = stored.matrix()
    for x in (torch.ones(9, 20), torch.ones(0, 20), torch.ones(20), torch.ones(1, 19)):
        with pytest.raises(ValueError, match=r"x must be \(1..8, 20\)"):
            linear(matrix, x)
    with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
        linear(matrix, torch.ones(1, 20, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous in its rows"):
        linear(matrix, torch.ones(20, 2).T)
    with pytest.raises(ValueError, match="no kernel for fp16"):
        linear(store("fp16", 4, 20, masked=True).matrix(), torch.ones(1, 20))
    with pytest.raises(ValueError, match="rows 0 to 5 were asked for; there are 4"):
        unpack(matrix, 0, 5)
    with pytest.raises(ValueError, match="rows -1 to 3 were asked for; there are 4"):
        gather(matrix, torch.tensor([3, -1]))
    with pytest.raises(ValueError, match="float32 or bfloat16, not torch.float16"):
        unpack(matrix, 0, 4, torch.float16)


def chosen_by_environment(name: str) -> str:
    code = (
        "import torch; from llmsparse.kernels.cpu.library import Matrix, linear\n"
        "matrix = Matrix('bf16', (1, 1), torch.ones(1, 1, dtype=torch.bfloat16).view(torch.int16))\n"
        "print(linear(matrix, torch.ones(1, 1)).item())"
    )
    environment = {**library.os.environ, "LLMSPARSE_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_the_environment_chooses_the_instruction_set() -> None:
    assert chosen_by_environment("portable") == "1.0\n"
    assert "LLMSPARSE_ISA=mmx is unknown; known are " in chosen_by_environment("mmx")
    for name, reason in available().items():
        if reason is not None:
            assert f"LLMSPARSE_ISA={name} is unusable: {reason}" in chosen_by_environment(name)


def test_the_argument_chooses_the_instruction_set() -> None:
    matrix = store("bf16", 2, 5, masked=True).matrix()
    with pytest.raises(ValueError, match="isa=mmx is unknown"):
        linear(matrix, torch.ones(1, 5), "mmx")


def test_torch_threads_run_the_kernels() -> None:
    """A second pool would fight torch's for the cores."""
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch has no OpenMP")
    assert library._torch_parallel()
