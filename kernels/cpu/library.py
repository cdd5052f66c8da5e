"""The native kernels as functions of tensors."""

import ctypes
import os
import re
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmsparse.errors import UserError

MAX_TOKENS = 8
_KINDS = {"bf16": 0, "fp16": 1, "fp32": 2, "int8": 3, "int4": 4}  # enum kind in matrix.h
_DTYPES = {
    "bf16": torch.int16,
    "fp16": torch.int16,
    "fp32": torch.int32,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_HAS_SCALES = ("int8", "int4")
_NOT_BUILT = "the native kernels are not built: install llmsparse where a C compiler is (CC, or gcc)"


class _Struct(ctypes.Structure):
    """struct matrix in matrix.h."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("mask", c_void_p),
        ("values", c_void_p),
        ("values_bytes", c_int64),
        ("starts", c_void_p),
        ("scales", c_void_p),
        ("group", c_int64),
        ("kind", c_int64),
    ]


@cache
def _load() -> ctypes.CDLL | None:
    """The shared library beside this file, told to use torch's threads; None where it was not built."""
    files = sorted(Path(__file__).parent.glob("native*.so"))
    if not files:
        return None
    library = ctypes.CDLL(str(files[0]))
    library.isa_name.restype = library.isa_missing.restype = c_char_p
    library.linear.argtypes = [c_void_p, c_int, c_void_p, c_int, c_int64, c_int64, c_void_p, c_int]
    library.unpack.argtypes = [c_void_p, c_int, c_void_p, c_int64, c_int64, c_int, c_void_p, c_int]
    library.check.argtypes = [c_void_p, c_int64, c_int64, c_int, c_void_p, c_int]
    library.use_parallel.argtypes = [c_void_p]
    library.use_parallel.restype = None
    library.use_parallel(_torch_parallel())
    return library


def _torch_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch runs on."""
    for path in _openmp_libraries():
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _openmp_libraries() -> list[str]:
    """OpenMP libraries that this process has loaded, those that lie with torch first."""
    name = re.compile(r"lib(gomp|i?omp5?)\b.*\.(so|dylib)")
    home = Path(torch.__file__).parent
    bundled = [*home.glob("lib/*omp*"), *home.parent.glob("torch.libs/*omp*")]
    paths = [str(path) for path in bundled if name.match(path.name)]
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "omp" in line}
        loaded = {path for path in loaded if name.match(Path(path).name)}
        paths = [path for path in paths if os.path.realpath(path) in loaded] + sorted(loaded)
    return paths


def _library() -> ctypes.CDLL:
    library = _load()
    if library is None:
        raise RuntimeError(_NOT_BUILT)
    return library


@cache
def available() -> dict[str, str | None]:
    """Instruction sets, the fastest first: None where one is usable here, else the reason why not."""
    library = _load()
    if library is None:
        return {"native": _NOT_BUILT}
    found: dict[str, str | None] = {}
    while name := library.isa_name(len(found)):
        missing = library.isa_missing(len(found))
        found[name.decode()] = missing.decode() if missing else None
    return found


@cache
def _isa(name: str | None) -> int:
    """The index of an instruction set; of the fastest, or of the one that LLMSPARSE_ISA names, without a name."""
    _library()
    isas = available()
    asked = name or os.environ.get("LLMSPARSE_ISA") or None
    if asked is None:
        return next(index for index, reason in enumerate(isas.values()) if reason is None)
    source = "isa" if name else "LLMSPARSE_ISA"
    if asked not in isas:
        raise UserError(f"{source}={asked} is unknown; known are {', '.join(isas)}")
    if isas[asked] is not None:
        usable = ", ".join(isa for isa, reason in isas.items() if reason is None)
        raise UserError(f"{source}={asked} is unusable: {isas[asked]}; usable are {usable}")
    return list(isas).index(asked)


def used() -> str | None:
    """The instruction set that products run in; None where no native kernel runs.

    Raises:
        UserError: LLMSPARSE_ISA names one that cannot be used here.
    """
    return None if all(available().values()) else list(available())[_isa(None)]


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    _need(tensor.device.type == "cpu", f"{name} must lie on the CPU; it is on {tensor.device}")
    _need(tensor.dtype == dtype, f"{name} must be {dtype}; it is {tensor.dtype}")
    _need(tensor.is_contiguous(), f"{name} must be contiguous; its strides are {tuple(tensor.stride())}")
    aligned = tensor.data_ptr() % tensor.element_size() == 0
    _need(aligned, f"{name} must be aligned to its elements of {tensor.element_size()} bytes")


def starts(mask: Tensor, columns: int, per_byte: int = 1) -> Tensor:
    """Where each row's values begin, and where the last row's end: int64 (rows + 1,).

    ``per_byte=2`` counts bytes of int4 values, whose rows begin at whole bytes.

    Raises:
        ValueError: the mask is no uint8 (rows, ceil(columns / 8)), or has bits beyond ``columns``.
    """
    _check_tensor("mask", mask, torch.uint8)
    wanted = (mask.shape[0], (columns + 7) // 8)
    _need(
        tuple(mask.shape) == wanted, f"mask must be {wanted} for {columns} columns; it is {tuple(mask.shape)}"
    )
    found = torch.empty(wanted[0] + 1, dtype=torch.int64, device="cpu")
    threads = torch.get_num_threads()
    beyond = _library().check(mask.data_ptr(), wanted[0], columns, per_byte, found.data_ptr(), threads)
    _need(not beyond, f"mask has bits set beyond its {columns} columns")
    return found


class Matrix:
    """A weight (out, in) as docs/format.md stores it, and the tensors that its struct points into.

    ``kind`` is the format's name of the values: bf16, fp16, fp32, int8 or int4:G. Without a mask every value is
    stored (the layout ``dense``).

    Raises:
        ValueError: a tensor does not fit the kind, the shape or the mask.
    """

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int],
        values: Tensor,
        mask: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        name, _, group = kind.partition(":")
        valid = name in _KINDS and (group.isdecimal() and int(group) > 0 if name == "int4" else not group)
        _need(valid, f"values {kind} are unknown; known are bf16, fp16, fp32, int8, int4:G")
        self.kind, self.shape = kind, (int(shape[0]), int(shape[1]))
        _need(min(self.shape) > 0, f"shape must be positive; it is {self.shape}")
        rows, columns = self.shape
        _check_tensor("values", values, _DTYPES[name])
        per_byte = 2 if name == "int4" else 1
        begins = None if mask is None else starts(mask, columns, per_byte)
        _need(mask is None or mask.shape[0] == rows, f"mask must have {rows} rows")
        size = rows * -(-columns // per_byte) if begins is None else int(begins[-1])
        _need(values.numel() == size, f"values must hold {size} elements; they hold {values.numel()}")
        per_scale = int(group) if group else columns
        if name in _HAS_SCALES:
            _need(scales is not None, f"values {kind} need scales")
            assert scales is not None
            _check_tensor("scales", scales, torch.bfloat16)
            wanted = (rows, -(-columns // per_scale))
            _need(tuple(scales.shape) == wanted, f"scales must be {wanted}; they are {tuple(scales.shape)}")
        _need(name in _HAS_SCALES or scales is None, f"values {kind} take no scales")
        self._tensors = (values, mask, begins, scales)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        self._struct = _Struct(
            rows=rows,
            columns=columns,
            mask=pointers[1],
            values=pointers[0],
            values_bytes=values.numel() * values.element_size(),
            starts=pointers[2],
            scales=pointers[3],
            group=per_scale,
            kind=_KINDS[name],
        )
        self._address = ctypes.addressof(self._struct)

    @property
    def multiplies(self) -> bool:
        """Whether ``linear`` takes these values; others are unpacked."""
        return self._struct.kind in (_KINDS["bf16"], _KINDS["int8"], _KINDS["int4"])


def _check_inputs(matrix: Matrix, x: Tensor) -> None:
    _need(matrix.multiplies, f"linear has no kernel for {matrix.kind}; unpack the matrix")
    _need(x.device.type == "cpu", f"x must lie on the CPU; it is on {x.device}")
    known = (torch.float32, torch.bfloat16)
    _need(x.dtype in known, f"x must be float32 or bfloat16; it is {x.dtype}")
    wanted = f"(1..{MAX_TOKENS}, {matrix.shape[1]})"
    fits = x.dim() == 2 and 1 <= x.shape[0] <= MAX_TOKENS and x.shape[1] == matrix.shape[1]
    _need(fits, f"x must be {wanted}; it is {tuple(x.shape)}")
    _need(x.stride(1) == 1 or x.shape[1] == 1, f"x must be contiguous in its rows; strides {x.stride()}")


def linear(matrix: Matrix, x: Tensor, isa: str | None = None) -> Tensor:
    """x Wᵀ in float32, (tokens, out), for 1 to 8 tokens of float32 or bfloat16 (tokens, in).

    Integer weights meet activations of 8 bits and a sign, with a scale for each token and 64 columns.

    Raises:
        ValueError: x does not fit the matrix, or the instruction set is not usable here.
        RuntimeError: the library was not built.
    """
    tokens = x.shape[0] if x.dim() == 2 else 0
    # The one test of the common case; what is wrong is told apart only where it fails.
    if not (
        0 < tokens <= MAX_TOKENS
        and x.shape[1] == matrix.shape[1]
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.stride(1) == 1
        and x.device.type == "cpu"
        and matrix.multiplies
    ):
        _check_inputs(matrix, x)
    y = torch.empty(tokens, matrix.shape[0], dtype=torch.float32, device="cpu")
    failed = _library().linear(
        matrix._address,
        _isa(isa),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        tokens,
        x.stride(0),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the activations of {tokens} tokens, {matrix.shape[1]} columns")
    return y


def unpack(
    matrix: Matrix, first: int, last: int, dtype: torch.dtype = torch.float32, isa: str | None = None
) -> Tensor:
    """Rows first to last - 1 as a dense tensor of float32 or bfloat16.

    Raises:
        ValueError: the rows do not exist, or the dtype is another.
        RuntimeError: the library was not built.
    """
    rows = matrix.shape[0]
    _need(0 <= first <= last <= rows, f"rows {first} to {last} were asked for; there are {rows}")
    return _unpack(matrix, None, first, last - first, dtype, isa)


def gather(
    matrix: Matrix, rows: Tensor, dtype: torch.dtype = torch.float32, isa: str | None = None
) -> Tensor:
    """The rows that an int64 tensor names, as a dense tensor (*rows.shape, in) of float32 or bfloat16.

    Raises:
        ValueError: a row does not exist, or a dtype is another.
        RuntimeError: the library was not built.
    """
    chosen = rows.contiguous()
    _check_tensor("rows", chosen, torch.int64)
    if chosen.numel():
        low, high = (int(edge) for edge in chosen.aminmax())
        there = low >= 0 and high < matrix.shape[0]
        _need(there, f"rows {low} to {high} were asked for; there are {matrix.shape[0]}")
    out = _unpack(matrix, chosen, 0, chosen.numel(), dtype, isa)
    return out.view(*rows.shape, matrix.shape[1])


def _unpack(
    matrix: Matrix, chosen: Tensor | None, first: int, count: int, dtype: torch.dtype, isa: str | None
) -> Tensor:
    _need(dtype in (torch.float32, torch.bfloat16), f"rows unpack to float32 or bfloat16, not {dtype}")
    out = torch.empty(count, matrix.shape[1], dtype=dtype, device="cpu")
    failed = _library().unpack(
        matrix._address,
        _isa(isa),
        None if chosen is None else chosen.data_ptr(),
        first,
        count,
        dtype == torch.bfloat16,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for a copy of the last rows")
    return out
