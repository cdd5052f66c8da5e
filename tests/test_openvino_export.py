"""export --format openvino: the integers in the file are the codes, and OpenVINO computes what transformers does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model
from llmsparse.export import export
from llmsparse.gridfile import GridFile
from llmsparse.openvino_runtime import EXACT, Session
from tests.packed_tiny import add_grid, sparse
from tests.pruned import tensors

openvino = pytest.importorskip("openvino")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
IDS = [3 + 7 * i % 120 for i in range(40)]  # five sliding windows


def written(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """Of every matrix product and table: integers (out, groups, group), scales (out, groups), type of the integers.

    Found from the products up, through multiplication and conversions, whatever the nodes are called.
    """
    found = {}
    for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ops():
        if node.get_type_name() not in ("MatMul", "Gather"):
            continue
        above = node.input_value(1 if node.get_type_name() == "MatMul" else 0).get_node()
        if above.get_type_name() == "Reshape":
            above = above.input_value(0).get_node()
        if above.get_type_name() != "Multiply":
            continue
        codes, scales = (up(above.input_value(i).get_node()) for i in (0, 1))
        if codes is None:
            continue
        kind = codes.get_element_type().get_type_name()
        raw = codes.data.reshape(-1).view(np.uint8)
        if kind == "i4":  # two in a byte, the first lowest
            raw = np.stack([raw & 15, raw >> 4], 1).reshape(-1)
            raw = np.where(raw > 7, raw.astype(np.int16) - 16, raw)
        integers = raw.astype(np.int16) if kind == "i4" else raw.view(np.int8)
        found[codes.get_friendly_name()] = (
            integers.reshape(scales.shape[0], int(np.prod(scales.shape[1:])), -1),
            scales.data.astype(np.float32).reshape(scales.shape[0], -1),
            kind,
        )
    return found


def up(node):
    """The constant behind a conversion."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


@torch.no_grad()
def source_logits(folder: Path) -> Tensor:
    model = load_model(Checkpoint(folder), torch.float32, torch.device("cpu"), False)
    return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def pieces(folder: Path, *sizes: int) -> Tensor:
    """Logits of ``IDS``, read in calls of so many tokens."""
    session, start, found = Session(str(folder / "openvino_model.xml"), EXACT), 0, []
    for size in sizes:
        found.append(session.logits(IDS[start : start + size]).copy())
        start += size
    assert start == len(IDS)
    return torch.from_numpy(np.concatenate(found))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid, kind, group", [("int8", "i8", 64), ("int4:32", "i4", 32), ("int4:64", "i4", 64)])
def test_the_codes_beside_the_model_are_the_files(
    tmp_path: Path, family: str, grid: str, kind: str, group: int
) -> None:
    add_grid(sparse(tmp_path / "sparse", family), grid)
    result = export(tmp_path / "sparse", tmp_path / "out", format="openvino")
    codes, found = GridFile.open(tmp_path / "sparse"), written(tmp_path / "out")
    assert codes is not None and result["layouts"][grid] == len(codes.names) == 21
    assert set(found) == set(codes.names)
    for name in codes.names:
        integers, scales, stored = found[name]
        assert stored == kind and integers.shape[2] == min(group, codes.codes(name).shape[1])
        assert np.array_equal(integers.reshape(len(integers), -1), codes.codes(name).numpy()), name
        assert np.array_equal(scales, codes.scales(name).numpy()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_openvino_computes_what_transformers_does_in_one_go_and_token_by_token(
    tmp_path: Path, family: str
) -> None:
    add_grid(sparse(tmp_path / "sparse", family), "int4:32")
    export(tmp_path / "sparse", tmp_path / "out", format="openvino", embeddings=None)
    wanted = source_logits(tmp_path / "sparse")
    table = 2e-2  # of the fp16 tables: the source's are bf16, which fp16 holds almost
    for sizes in ([40], [1] * 40, [20, 1, 1, 18]):
        assert torch.allclose(pieces(tmp_path / "out", *sizes), wanted, rtol=0, atol=table)
