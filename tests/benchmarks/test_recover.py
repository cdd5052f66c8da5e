"""benchmarks.recover: the rows of a tiny model, and that none is measured twice."""

import sys

import pytest

from benchmarks import recover as benchmark
from benchmarks import rows
from tests.tiny import save_tiny


@pytest.mark.long
def test_rows_are_measured_once_and_a_table_says_what_came_back(tmp_path, text, monkeypatch, capsys):
    folder = save_tiny("llama", tmp_path / "tiny")
    monkeypatch.setenv("LLMSPARSE_DATA", str(tmp_path))
    small = "--tasks --data TEXT --judged-on TEXT --context 64 --windows 2 --samples 4 --sequence-length 32 --device cpu"
    options = (
        "--patterns 50% --solver magnitude --tokens 0 3k --options lr=1e-3 sequence_length=32 dtype=float32"
    )
    given = [text if part == "TEXT" else part for part in f"{small} {options}".split()]
    place = ["--keep", str(tmp_path / "kept"), "--results", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["recover", f"tiny={folder}", *given, *place])
    benchmark.main()
    dense, sparse, trained = rows.read(tmp_path / "rows.json")
    assert [row["tokens"] for row in (dense, sparse, trained)] == [0, 0, 3000]
    assert dense["solver"] == "dense" and trained["options"] == sorted(
        ["lr=1e-3", "sequence_length=32", "dtype=float32"]
    )
    assert trained["kl"]["after"] < trained["kl"]["before"]
    assert 0 < trained["fraction_of_matmul_rate"] < 1
    assert trained["fraction_of_matmul_rate"] == pytest.approx(
        (8 * 3 * 9216 + 6 * 4096) * 3072 / trained["train_seconds"] / 1e9 / trained["matmul_gflops"]
    )  # forward, backward and the teacher's forward; three blocks of 9,216 weights, and the output table
    assert str(tmp_path) not in (tmp_path / "rows.json").read_text()
    monkeypatch.setattr(benchmark, "_measure", lambda *_: pytest.fail("measured again"))
    capsys.readouterr()
    benchmark.main()
    assert "| 50% | 3,000 |" in capsys.readouterr().out
