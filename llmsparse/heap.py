"""Freed memory: kept for the next block or step, or given back to the system before the process grows."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ALLOWANCE = 1 / 16  # how far a later block may outgrow the first one
TRIMMED, MAPPED = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
NEVER = 2**31 - 1
USUAL = 32 << 20  # what the second rises to by itself, once large pieces were freed


class Heap:
    """What glibc keeps of one block's freed memory serves the next, but in pieces that often do not fit.

    So a run would grow, block by block; and with everything given back after each block, the system would have
    to clear every page anew, which takes time. Hence: back only once a block has outgrown the first one.
    """

    def __init__(self) -> None:
        return_freed_memory()
        self._before = resident_now()
        self._first: int | None = None

    def block_done(self) -> None:
        grown = resident_now() - self._before  # 0 where the system does not tell
        if self._first is None:
            self._first = grown
        if grown > (1 + ALLOWANCE) * self._first or not grown:
            return_freed_memory()


def resident_now() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def return_freed_memory() -> None:
    """Give freed memory back to the system, where glibc keeps it."""
    with suppress(OSError, AttributeError, TypeError):  # another C library: it does so by itself, or cannot
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, glibc keeps what is freed: steps that are all alike would have the same pages cleared again and again."""
    _thresholds(NEVER, NEVER)
    try:
        yield
    finally:
        _thresholds(USUAL, 2 * USUAL)
        return_freed_memory()


def _thresholds(mapped: int, trimmed: int) -> None:
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(MAPPED, mapped)
        library.mallopt(TRIMMED, trimmed)
