"""The file that holds the tensors of an ONNX model: written one after the other, read where they are used."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DATA = "model.onnx.data"
ALIGNED = 64  # bytes, of where a tensor begins
CHUNK = 1 << 24  # bytes that are copied at a time


class Writer:
    """Puts tensors into the data file, one after the other."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.written: dict[str, tuple[int, int]] = {}  # key -> offset and bytes

    def put(self, tensor: Any, array: np.ndarray, key: str) -> None:
        """Say where the tensor's data is, after writing it; what has the ``key`` already is not written again."""
        import onnx

        if key not in self.written:
            self.stream.write(bytes(-self.stream.tell() % ALIGNED))
            start = self.stream.tell()
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for first in range(0, len(flat), CHUNK):
                self.stream.write(flat[first : first + CHUNK].data)
            self.written[key] = start, len(flat)
        offset, length = self.written[key]
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for name, value in (("location", DATA), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=name, value=str(value))


def array(tensor: Any, folder: Path) -> np.ndarray:
    """A tensor's data; read from the disk where it is used."""
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    said = {entry.key: entry.value for entry in tensor.external_data}
    place, shape = folder / said["location"], tuple(tensor.dims)
    return np.memmap(place, dtype, "r", int(said.get("offset", 0)), shape)
