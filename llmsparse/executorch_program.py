"""A module as a .pte file that ExecuTorch runs on CPUs with XNNPACK, and the weights in such a file."""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export, torchao and ExecuTorch say of themselves: nothing that a user could act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def lower(module: nn.Module, inputs: tuple[Tensor, ...], constants: dict[str, Any], file: Path) -> None:
    """Write ``module``, run on tensors shaped as ``inputs``; ``constants``: methods that return a value each."""
    with quiet(), torch.no_grad():
        import executorch.kernels.quantized  # noqa: F401  # the operators of codes
        from executorch.backends.xnnpack.utils.configs import get_xnnpack_edge_compile_config
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

        program = to_edge_transform_and_lower(
            torch.export.export(module, inputs, strict=False),
            partitioner=[_partitioner()],
            compile_config=get_xnnpack_edge_compile_config(skip_dim_order=True),
            constant_methods=constants,
        ).to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))  # else each token copies the caches
        with file.open("wb") as stream:
            program.write_to_file(stream)


def _partitioner() -> Any:
    """XNNPACK's own, but a linear layer may have codes for weights and floats for inputs.

    XNNPACK multiplies such weights (f32_qc8w), but its partitioner gives it codes only where inputs are rounded too.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.partition.config.generic_node_configs import GeluConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.backend_details import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    class Linear(LinearConfig):
        def _get_act_deps(self, node: Any, ep: Any, precision: Any) -> tuple[bool, list[Any]]:
            return True, []

        def _get_output_deps(self, node: Any, ep: Any, precision: Any) -> tuple[bool, list[Any]]:
            return True, []

    # XNNPACK's GELU is approximate (a tiny Gemma's logits are 1.4e-3 off), ExecuTorch's own is not (6e-6)
    exact = [config for config in ALL_PARTITIONER_CONFIGS if config is not GeluConfig]
    configs = [Linear if config is LinearConfig else config for config in exact]
    partitioner = XnnpackPartitioner(configs=configs)
    # one pass over each part instead of 17, which took over half of a profiled run; the others are for other operators
    spec = CompileSpec("dqlinear_partitioner", b"")
    partitioner.delegation_spec = DelegationSpec(partitioner.delegation_spec.backend_id, [spec])
    return partitioner


def key(tensor: Tensor) -> str:
    """The name that a linear layer's weight has in the file: the SHA-256 of its bytes, as XNNPACK's part names it."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def stored(file: Path) -> dict[str, bytes]:
    """The named constants of a .pte file, which are those of XNNPACK."""
    with quiet():
        from executorch.exir._serialize import _deserialize_pte_binary

        named = _deserialize_pte_binary(file.read_bytes()).named_data
    if named is None:
        return {}
    return {name: bytes(named.buffers[entry.buffer_index]) for name, entry in named.pte_data.items()}
