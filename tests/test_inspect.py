"""inspect: the zeros and patterns that it finds are those that were put there."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.inspect import inspect
from llmsparse.pattern import NM, Unstructured

Row = dict


def folder(path: Path, tensors: dict[str, Tensor], binary: bool = False) -> Path:
    """A checkpoint folder of these tensors."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if binary:
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def random(*shape: int, pattern: NM | Unstructured | None = None) -> Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return weight if pattern is None else weight.where(pattern.select(weight.abs()), 0.0)


def found(path: Path, weight: Tensor) -> Row:
    return inspect(folder(path, {"w": weight.contiguous()}))["weights"][0]


@pytest.mark.parametrize("n, m", [(1, 2), (1, 4), (3, 4), (3, 8), (5, 8), (1, 16), (7, 16), (15, 16)])
def test_the_strictest_pattern_is_found_along_rows_and_along_columns(tmp_path: Path, n: int, m: int) -> None:
    weight = random(64, 96, pattern=NM(n, m))
    row = found(tmp_path, weight)
    assert row["pattern"] == f"{n}:{m}"
    assert row["sparsity"] == 1 - n / m
    assert found(tmp_path, weight.T)["pattern"] == f"{n}:{m} (columns)"


def test_4_of_8_is_not_called_2_of_4_nor_the_other_way_round(tmp_path: Path) -> None:
    assert found(tmp_path, random(64, 64, pattern=NM(4, 8)))["pattern"] == "4:8"
    assert found(tmp_path, random(64, 64, pattern=NM(2, 4)))["pattern"] == "2:4"


def test_dense_and_unstructured_weights_have_no_pattern(tmp_path: Path) -> None:
    assert found(tmp_path, random(64, 64))["pattern"] is None
    row = found(tmp_path, random(256, 256, pattern=Unstructured(0.25)))
    assert (row["pattern"], row["sparsity"]) == (None, 0.25)


def test_an_m_that_does_not_divide_the_inputs_is_no_candidate(tmp_path: Path) -> None:
    weight = random(7, 12, pattern=NM(2, 4))
    assert found(tmp_path, weight)["pattern"] == "2:4"
    assert found(tmp_path, weight[:, :11])["pattern"] is None


def test_a_weight_of_zeros_satisfies_the_strictest_pattern_of_all(tmp_path: Path) -> None:
    row = found(tmp_path, torch.zeros(16, 16))
    assert (row["pattern"], row["sparsity"]) == ("1:16", 1.0)


def test_stacked_experts_are_measured_one_by_one(tmp_path: Path) -> None:
    experts = torch.stack([random(8, 16, pattern=NM(2, 4)) for _ in range(3)])
    row = found(tmp_path, experts)
    assert (row["shape"], row["pattern"], row["sparsity"]) == ([3, 8, 16], "2:4", 0.5)
    assert found(tmp_path, experts.transpose(1, 2))["pattern"] == "2:4 (columns)"
    experts[2] = random(8, 16)
    assert found(tmp_path, experts)["pattern"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_negative_zeros_are_zeros_and_are_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.ones(8, 16)
    weight[0, :4] = -0.0
    weight[1, :2] = 0.0
    row = found(tmp_path, weight.to(dtype))
    assert (row["zeros"], row["negative_zeros"]) == (6, 4)
    assert row["dtype"] == str(dtype).removeprefix("torch.")


def test_a_weight_larger_than_a_piece_is_measured_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["llmsparse.inspect"], "PIECE", 32 * 16)  # four pieces
    weight = torch.ones(64, 32)
    weight[:, ::2] = 0
    weight[63, 0] = 1.0  # the last row alone breaks 1:2, and keeps 9 of 16
    row = found(tmp_path, weight)
    assert (row["pattern"], row["zeros"]) == ("9:16", 64 * 16 - 1)


def test_totals_count_weights_and_all_parameters_but_no_integers(tmp_path: Path) -> None:
    tensors = {
        "w": random(8, 16, pattern=NM(2, 4)),
        "embedding": random(4, 16),
        "norm": torch.tensor([0.0, 1.0, 2.0, 3.0]),
        "scalar": torch.tensor(0.0),
        "position_ids": torch.zeros(2, 8, dtype=torch.int64),
    }
    result = inspect(folder(tmp_path / "m", tensors))
    assert sorted(w["name"] for w in result["weights"]) == ["embedding", "w"]
    totals = result["totals"]
    assert (totals["weight_parameters"], totals["weight_zeros"]) == (192, 64)
    assert (totals["parameters"], totals["zeros"]) == (197, 66)
    assert totals["weight_sparsity"] == 64 / 192
    assert totals["sparsity"] == 66 / 197


def test_bin_files_are_read_too(tmp_path: Path) -> None:
    result = inspect(folder(tmp_path / "m", {"w": random(8, 16, pattern=NM(1, 4))}, binary=True))
    assert result["weights"][0]["pattern"] == "1:4"


def test_tensors_are_read_one_by_one_and_files_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    read, close = Checkpoint.tensor, Checkpoint.close
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: events.append(name) or read(self, name))
    monkeypatch.setattr(Checkpoint, "close", lambda self: events.append("closed") or close(self))
    inspect(folder(tmp_path / "m", {"a": random(4, 4), "b": random(4, 4), "c": random(4)}))
    assert sorted(events[:-1]) == ["a", "b", "c"] and events[-1] == "closed"


def test_no_checkpoint_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.json"):
        inspect(tmp_path)
