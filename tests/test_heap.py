"""Freed memory goes back to the system when the process grows, and not after every block."""

import platform

import pytest

from llmsparse import heap


@pytest.fixture
def machine(monkeypatch):
    """``resident`` is what the process holds; giving back frees it all but 100."""

    class Machine:
        resident, given_back = 100, 0

    def give_back():
        Machine.resident, Machine.given_back = 100, Machine.given_back + 1

    monkeypatch.setattr(heap, "resident_now", lambda: Machine.resident)
    monkeypatch.setattr(heap, "return_freed_memory", give_back)
    return Machine


def blocks(found, machine, *sizes):
    """How often memory went back after blocks that left the process at these sizes."""
    before = machine.given_back
    for size in sizes:
        machine.resident = size
        found.block_done()
    return machine.given_back - before


def test_blocks_like_the_first_one_keep_the_memory(machine):
    assert blocks(heap.Heap(), machine, 260, 260, 250, 269) == 0


def test_a_block_that_outgrows_the_first_one_gives_it_back(machine):
    found = heap.Heap()
    assert blocks(found, machine, 260, 271) == 1
    assert blocks(found, machine, 260) == 0


def test_where_the_system_tells_nothing_every_block_gives_back(machine, monkeypatch):
    monkeypatch.setattr(heap, "resident_now", lambda: 0)
    assert blocks(heap.Heap(), machine, 1, 2) == 2


def test_freed_memory_really_goes_back():
    """On glibc: many small pieces, which it would keep below one that is still used."""
    pieces = [bytearray(100_000) for _ in range(1000)]
    held = heap.resident_now()
    if not held:
        pytest.skip("this system does not tell what a process holds")
    last = pieces[-1]
    del pieces
    heap.return_freed_memory()
    assert heap.resident_now() < held - 50_000_000
    assert len(last) == 100_000


def test_inside_kept_large_pieces_stay_with_the_process_and_go_back_after_it():
    def freed(size=200_000_000):
        piece = bytearray(size)
        piece[::4096] = b"x" * len(piece[::4096])
        del piece
        return heap.resident_now()

    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library has no such setting")
    before = freed()
    with heap.kept():
        inside = freed()
    assert inside > before + 150_000_000
    assert heap.resident_now() < before + 50_000_000
    assert freed() < before + 50_000_000
