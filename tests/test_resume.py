"""An interrupted run: nothing is lost, and going on gives the same bytes."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmsparse.errors import UserError
from llmsparse.prune import prune
from tests.pruned import ONE_THREAD, SMALL, hashes
from tests.tiny import save_tiny


def command(*arguments):
    return [sys.executable, "-m", "llmsparse", "prune", *map(str, arguments)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in (1, 2))])
def test_a_run_killed_at_a_random_moment_resumes_to_identical_bytes(seed, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    given = [source, tmp_path / "out", "--calibration", text, "--samples", 300, "--sequence-length", 64]
    prune(source, tmp_path / "expected", calibration=text, samples=300, sequence_length=64)
    journal = tmp_path / ".out.llmsparse-work" / "journal.jsonl"
    process = subprocess.Popen(
        command(*given), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD
    )
    chance = random.Random(seed)
    lines = chance.randint(1, 3)  # the fingerprint, and up to two blocks
    while process.poll() is None and not (
        journal.exists() and len(journal.read_text().splitlines()) >= lines
    ):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "out").exists():  # else it was killed after the last rename, and must be whole
        assert process.returncode == -signal.SIGKILL
        subprocess.run(command(*given, "--resume"), check=True, capture_output=True, env=ONE_THREAD)
        assert not (tmp_path / "out" / "journal.jsonl").exists()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")
    assert not journal.parent.exists()


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_replacement_killed_at_a_rename_loses_nothing(moment, tmp_path, text, monkeypatch):
    source, out = save_tiny("llama", tmp_path / "source"), tmp_path / "out"
    prune(source, out, calibration=text, **SMALL)
    old, given = hashes(out), {"calibration": text, "pattern": "2:4", "overwrite": True, **SMALL}
    prune(source, tmp_path / "expected", calibration=text, pattern="2:4", **SMALL)
    real, left = Path.rename, {"before": 0, "between": 1, "after": 2}[moment]

    def killed(self, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        result = real(self, target)
        if left == 0 and moment == "after":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(source, out, **given)
    monkeypatch.setattr(Path, "rename", real)
    if moment == "after":
        assert hashes(out) == hashes(tmp_path / "expected")
        return
    with pytest.raises(UserError, match="not empty"):
        prune(source, out, calibration=text, **SMALL)
    assert hashes(out) == old
    prune(source, out, resume=True, **given)
    assert hashes(out) == hashes(tmp_path / "expected")


def test_resume_with_a_half_written_block_gives_identical_bytes(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "expected", calibration=text, **SMALL)
    from llmsparse.writer import Writer

    real = Writer.write
    calls = []

    def fail_late(self, written):
        calls.append(written)
        if len(calls) == 4:
            real(self, {k: torch.full_like(v, 7) for k, v in written.items()})
            raise KeyboardInterrupt
        real(self, written)

    monkeypatch.setattr(Writer, "write", fail_late)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Writer, "write", real)
    with pytest.raises(UserError, match=r"differ from the interrupted one: .*seed: was 0, is 1"):
        prune(source, tmp_path / "out", calibration=text, seed=1, resume=True, **SMALL)
    prune(source, tmp_path / "out", calibration=text, resume=True, **SMALL)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_an_interrupted_run_is_not_thrown_away_unasked(tmp_path, text):
    source, work = save_tiny("llama", tmp_path / "source"), tmp_path / ".out.llmsparse-work"
    work.mkdir()
    (work / "journal.jsonl").write_text('{"fingerprint": {}}\n{"block": "half')
    with pytest.raises(UserError, match="continue it with --resume, or discard it with --overwrite"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert work.exists()
    prune(source, tmp_path / "out", calibration=text, overwrite=True, **SMALL)
    assert (tmp_path / "out").exists() and not work.exists()


def test_resume_with_nothing_done_starts_from_the_beginning(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "out", calibration=text, resume=True, **SMALL)
    assert (tmp_path / "out" / "report.json").exists()


def test_a_disk_that_fills_up_half_way_leaves_a_resumable_state(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "expected", calibration=text, **SMALL)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written: the disk is full; make room"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()
    prune(source, tmp_path / "out", calibration=text, resume=True, **SMALL)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")
