"""An ONNX model and its data: the builder's graph with codes in the place of weights, and read back as weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmsparse import onnx_blocks, onnx_data, onnx_layout
from llmsparse.onnx_build import FILE
from llmsparse.onnx_data import DATA, Writer
from llmsparse.onnx_layout import EMBEDDING, Piece
from llmsparse.values import Values

DOMAIN = "com.microsoft"
GATHERS = ("/model/embed_tokens/Gather", "/model/embed_tokens/Transpose")
ACCURACY = 4  # how MatMulNBits multiplies: see docs/export.md


class Coded(NamedTuple):
    """A weight as blocks of codes."""

    source: str  # the checkpoint's tensor: what is stored once for two nodes
    kind: Values
    block: int
    packed: np.ndarray  # uint8 (out, blocks, bytes)
    scales: np.ndarray  # float32 (out, blocks)
    inputs: int

    @property
    def attributes(self) -> dict[str, Any]:
        return {"bits": self.kind.bits, "block_size": self.block}


Draw = Callable[[Piece, np.ndarray], Coded | None]


def write(built: Path, out: Path, config: Any, draw: Draw, progress: Any) -> None:
    """Copy the graph of the folder ``built`` into ``out``, each weight as what ``draw`` gives for it.

    ``draw``: of rows of a layer and their weight (out, in) in the graph; None leaves it float.
    """
    import onnx

    model = onnx.load(str(built / FILE), load_external_data=False)
    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if _multiplies(node, floats, config)]
    progress.start("writing", len(nodes) + 1)
    with (out / DATA).open("wb") as stream:
        writer = Writer(stream)
        new = []
        for node in nodes:
            new += _product(node, floats[node.input[1]], built, config, draw, writer)
            progress.advance("writing", node.name)
        new += _lookup(model.graph, floats, built, draw, writer)
        progress.advance("writing", EMBEDDING)
        used = {name for node in model.graph.node for name in node.input}
        kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
        for tensor in kept:
            writer.put(tensor, onnx_data.array(tensor, built), tensor.name)
        del model.graph.initializer[:]
        model.graph.initializer.extend([*kept, *new])
    _exact_scale(model.graph, config)
    onnx.save(model, str(out / FILE))


def weights(folder: Path, config: Any) -> Iterator[tuple[Piece, np.ndarray]]:
    """Rows of each linear layer and of the output layer, float32 (out, in), as the file has them."""
    import onnx

    graph = onnx.load(str(folder / FILE), load_external_data=False).graph
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        piece = onnx_layout.piece(node.name, config)
        if piece is None or node.input[1] not in found:
            continue
        array = onnx_data.array(found[node.input[1]], folder)
        if node.op_type == "MatMulNBits":
            said = {attribute.name: attribute.i for attribute in node.attribute}
            scales = onnx_data.array(found[node.input[2]], folder)
            yield piece, onnx_blocks.weight(array, scales, said["bits"], said["K"])
        else:
            yield piece, array.T


def _multiplies(node: Any, floats: dict[str, Any], config: Any) -> bool:
    """Whether the node is the matrix product of a layer's weight."""
    found = onnx_layout.piece(node.name, config)
    return found is not None and node.op_type == "MatMul" and node.input[1] in floats


def _product(node: Any, tensor: Any, built: Path, config: Any, draw: Draw, writer: Writer) -> list[Any]:
    """Turn a matrix product into one of codes, where there are some; what it multiplies by."""
    import onnx

    piece = onnx_layout.piece(node.name, config)
    assert piece is not None
    coded = draw(piece, onnx_data.array(tensor, built).T)
    if coded is None:
        return []
    new = _tensors(coded, tensor.name, piece, coded.packed.shape, writer)
    node.op_type, node.domain = "MatMulNBits", DOMAIN
    del node.input[1:]
    node.input.extend([each.name for each in new])
    sizes = {"K": coded.inputs, "N": len(coded.packed), "accuracy_level": ACCURACY}
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in {**sizes, **coded.attributes}.items())
    return new


def _lookup(graph: Any, floats: dict[str, Any], built: Path, draw: Draw, writer: Writer) -> list[Any]:
    """Turn the embedding's look-up into one of codes, where there are some; what it looks up in."""
    import onnx

    old = [node for node in graph.node if node.name in GATHERS]
    gather = next(node for node in old if node.op_type == "Gather")
    table = next(floats[name] for node in old for name in node.input if name in floats)
    array = onnx_data.array(table, built)
    coded = draw(Piece(EMBEDDING), array if len(old) == 1 else array.T)
    if coded is None:
        return []
    rows = len(coded.packed)
    new = _tensors(coded, f"{EMBEDDING}.weight", Piece(EMBEDDING), (rows, coded.packed[0].size), writer)
    padded = coded.packed.shape[1] * coded.block != coded.inputs
    found = f"{gather.name}/padded" if padded else gather.output[0]
    nodes = [
        onnx.helper.make_node(
            "GatherBlockQuantized", [new[0].name, gather.input[1], new[1].name], [found], gather.name, domain=DOMAIN,
            gather_axis=0, quantize_axis=1, **coded.attributes,
        )
    ]  # fmt: skip
    if padded:
        ends = [_integers(f"{EMBEDDING}.{name}", value) for name, value in _cut(coded.inputs)]
        new += ends
        sliced = [found, *(end.name for end in ends)]
        nodes.append(onnx.helper.make_node("Slice", sliced, [gather.output[0]], f"{gather.name}/Slice"))
    _replace(graph, old, nodes)
    return new


def _cut(inputs: int) -> list[tuple[str, int]]:
    """Slice's first, last and axis that leave ``inputs`` numbers of a row."""
    return [("first", 0), ("last", inputs), ("axis", -1)]


def _integers(name: str, value: int) -> Any:
    """In the graph itself: shapes follow from it."""
    import onnx

    return onnx.numpy_helper.from_array(np.array([value], np.int64), name)


def _replace(graph: Any, old: list[Any], new: list[Any]) -> None:
    """Put nodes in the place of others."""
    names = [node.name for node in old]
    after: list[Any] = []
    for node in graph.node:
        if node.name == names[0]:
            after += new
        if node.name not in names:
            after.append(node)
    del graph.node[:]
    graph.node.extend(after)


def _tensors(coded: Coded, name: str, piece: Piece, shape: tuple[int, ...], writer: Writer) -> list[Any]:
    """Codes and scales; of a table that two nodes use the data is written once."""
    import onnx

    made = []
    for part, array, dims in (("codes", coded.packed, shape), ("scales", coded.scales, coded.scales.shape)):
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = onnx.TensorProto(name=f"{name}.{part}", data_type=kind, dims=dims)
        writer.put(tensor, array, f"{coded.source}.{piece.rows.start}.{part}")
        made.append(tensor)
    return made


def _exact_scale(graph: Any, config: Any) -> None:
    """Gemma multiplies embeddings by the root of their size, of which the builder keeps two decimals."""
    import onnx

    scaled = next((node for node in graph.node if node.name == "/model/embed_tokens/Mul"), None)
    if scaled is None:
        return
    constant = next(node for node in graph.node if node.output[0] == scaled.input[1])
    exact = onnx.numpy_helper.from_array(np.array(config.hidden_size**0.5, np.float32))
    own = onnx.helper.make_node("Constant", [], [f"{scaled.name}/scale"], f"{scaled.name}/scale", value=exact)
    scaled.input[1] = own.output[0]
    graph.node.insert(list(graph.node).index(constant), own)
