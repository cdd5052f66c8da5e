"""A llama in C for the smallest devices: model.h holds it, llama.c runs it without a heap: docs/c_header.md."""

import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse import export_report
from llmsparse.atomic import whole_folder
from llmsparse.c_arrays import Arrays
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.grid import Grid
from llmsparse.gridfile import GridFile
from llmsparse.heap import return_freed_memory
from llmsparse.packed import Packed, smallest
from llmsparse.packing import Candidate, Numbers, candidates
from llmsparse.skeleton import Skeleton
from llmsparse.values import Values
from llmsparse.writer import disk_errors

EXTRA = Extra()
FAMILIES = ("llama", "mistral", "qwen2")
CONTEXT = 256  # tokens that model.h makes room for, where the user defines no LLAMA_CONTEXT
RUNTIME = Path(__file__).with_name("llama.c")
LINEAR = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MATRIX, LAYER = 32, 7 * 32 + 8  # bytes of model.h's structures where pointers take four
HEAD = """\
/* A language model that `llmsparse export --format c-header` wrote; llama.c runs it. docs/c_header.md explains it. */
#ifndef LLAMA_MODEL_H
#define LLAMA_MODEL_H
#include <stdint.h>

{macros}
#ifndef LLAMA_CONTEXT
#define LLAMA_CONTEXT {context} /* tokens of prompt and answer together, for which there is room in RAM */
#endif

#define LLAMA_NO_PROMPT (-1)
#define LLAMA_TOO_LONG (-2)
#define LLAMA_BAD_TOKEN (-3)

/* Read a token at a position (0, 1, 2...); returns the likeliest next one, or an error below 0. */
int llama_step(int token, int position);

/* Continue a prompt of so many tokens: at most max of them into out, until the model ends its text (that token is the
   last) or the context is full. Returns how many were written, or an error below 0. */
int llama_generate(const int *prompt, int length, int *out, int max);

#ifdef LLAMA_DATA
struct llama_matrix {{
    int32_t rows, columns, group, bits; /* group: columns a scale; bits: of a code */
    const uint64_t *mask, *codes;       /* mask: none where every code is stored */
    const uint16_t *scales;
    const float *bias;
}};

struct llama_layer {{
    struct llama_matrix q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm;
}};

"""


Drawn = tuple[Values, Tensor, Tensor]  # kind, codes (out, in), scales (out, groups)


class Matrix(NamedTuple):
    """A weight that is in model.h, and the C initialiser that points at it."""

    candidate: Candidate
    packed: Packed
    text: str

    @property
    def stored(self) -> Stored:
        table = self.candidate.table or self.candidate.head
        return Stored(self.candidate.source, self.packed.layout, self.packed.bytes, table)

    @property
    def products(self) -> int:
        """Multiply-accumulates of one product."""
        return (
            self.packed.nnz
            if self.packed.layout == "bitmask"
            else self.packed.shape[0] * self.packed.shape[1]
        )


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write model.h, weight by weight, llama.c and export.json; what they take on a device is in the result."""
    begun = time.perf_counter()
    check_kind("--values", values)
    check_kind("--embeddings", embeddings)
    check_family(checkpoint.config(trust_remote_code))
    skeleton = Skeleton(checkpoint, trust_remote_code=trust_remote_code)
    shape = dimensions(skeleton.config)
    codes = GridFile.open(checkpoint.folder)
    numbers = Numbers(checkpoint, values if values or codes else "int8", embeddings)
    out = out.expanduser().absolute()
    with disk_errors(out), whole_folder(out) as folder:
        with (folder / "model.h").open("w", encoding="ascii") as stream:
            stream.write(HEAD.format(macros=_macros(shape), context=shape["context"]))
            arrays = Arrays(stream)
            matrices = _weights(arrays, skeleton, lambda c: draw(numbers, c, values, embeddings), progress)
            _tables(arrays, matrices, skeleton, shape["layers"])
            stream.write("#endif\n#endif\n")
        shutil.copyfile(RUNTIME, folder / RUNTIME.name)
        made = [*matrices.values()]
        result = sizes(checkpoint, [matrix.stored for matrix in made])
        result["bytes"]["after"] = sum(file.stat().st_size for file in folder.iterdir())
        result |= {"device": _device(made, shape, arrays.bytes), **_values(numbers, made)}
        result["seconds"] = round(time.perf_counter() - begun, 2)
        result["format"] = "c-header"
        export_report.write(folder, result)
    return {**result, "next": shlex.join(["cc", "-O3", "-DLLAMA_MAIN", str(out / RUNTIME.name), "-lm"])}


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What the C is worth, compiled for this machine: see ``llmsparse.c_check``."""
    from llmsparse.c_check import check

    return check(checkpoint, out, result, **options)


def before_check() -> None:
    """Refuse a check on a machine without a C compiler; UserError says what to install."""
    from llmsparse.c_program import compiler

    compiler()


def check_kind(option: str, name: str | None) -> None:
    """Refuse values that are no codes.

    Raises:
        UserError: says which are.
    """
    if name is not None and (name == "keep" or Values.parse(name).float_dtype is not None):
        raise UserError(f"{option} {name} was asked for; --format c-header stores int8 or int4:32 codes only")


def check_family(config: Any) -> None:
    """Refuse a model that llama.c does not run.

    Raises:
        UserError: names what it lacks.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    wrong = None
    if config.model_type not in FAMILIES:
        wrong = f"model_type {config.model_type}; it runs {', '.join(FAMILIES)}"
    elif config.hidden_act != "silu":
        wrong = f"hidden_act {config.hidden_act}; it runs silu"
    elif rope.get("rope_type", "default") != "default":
        wrong = f"rope_type {rope['rope_type']}; it runs default"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong = f"partial_rotary_factor {rope['partial_rotary_factor']}; it turns whole heads"
    if wrong is not None:
        raise UserError(f"--format c-header was asked for, and the model has {wrong}; use --format packed")


def longest_text(config: Any) -> int:
    """The tokens that llama.c may hold; a context within the sliding window never slides."""
    window = getattr(config, "sliding_window", None)
    longest = config.max_position_embeddings
    return longest if window is None else min(longest, window)


def dimensions(config: Any) -> dict[str, Any]:
    """The numbers that size llama.c's buffers, and others that it needs."""
    heads, longest = config.num_attention_heads, longest_text(config)
    return {
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": config.num_key_value_heads,
        "head": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "epsilon": float(config.rms_norm_eps),
        "max_context": longest,
        "context": min(longest, CONTEXT),
    }


def draw(numbers: Numbers, candidate: Candidate, values: str | None, embeddings: str | None) -> Drawn:
    """Kind, codes and scales of a weight: those beside the model, else the nearest to it, int8 by default."""
    if not _coded(numbers, candidate):
        asked = (embeddings if candidate.table or candidate.head else values) or "int8"
        return Values.parse(asked), *numbers.fitted(candidate, Grid.parse(asked))
    found = numbers.of(candidate)
    assert found is not None and found[2] is not None  # codes have scales
    return found[0], found[1], found[2]


def _coded(numbers: Numbers, candidate: Candidate) -> bool:
    return numbers.codes is not None and candidate.source in numbers.codes.names


def _weights(
    arrays: Arrays, skeleton: Skeleton, drawn: Callable[[Candidate], Drawn], progress: Any
) -> dict[str, Matrix]:
    """Write every weight, one in memory at a time: module path -> where it is."""
    found = candidates(skeleton)
    if found.warnings:
        raise UserError(f"--format c-header stores every weight as codes, but {found.warnings[0]}")
    progress.start("packing", len(found.packable))
    matrices = {}
    for candidate in found.packable:
        matrices[candidate.path] = _matrix(arrays, candidate, drawn(candidate), skeleton)
        skeleton.checkpoint.close()
        return_freed_memory()
        progress.advance("packing", candidate.path)
    return matrices


def _matrix(arrays: Arrays, candidate: Candidate, drawn: Drawn, skeleton: Skeleton) -> Matrix:
    """Write a weight's arrays. Tables are dense: their rows are looked up."""
    kind, codes, scales = drawn
    shape = codes.shape[0], codes.shape[1]
    table = candidate.table or candidate.head
    packed = Packed("dense", kind.name, shape) if table else smallest(codes, kind, ("bitmask", "dense"))
    assert packed is not None  # codes are always packed
    tensors = packed.format.pack(packed, codes)
    name = "llama_" + candidate.path.removeprefix("model.").replace(".", "_")
    parts = ["0", arrays.of_bytes(f"{name}_codes", tensors["values" if "mask" in tensors else "codes"])]
    if "mask" in tensors:
        parts[0] = arrays.of_bytes(f"{name}_mask", tensors["mask"])
    parts.append(arrays.of_scales(f"{name}_scales", scales))
    bias = f"{candidate.path}.bias"
    parts.append(_floats(arrays, f"{name}_bias", skeleton, bias) if bias in skeleton.sources else "0")
    text = f"{{{shape[0]}, {shape[1]}, {kind.group or shape[1]}, {kind.bits}, {', '.join(parts)}}}"
    return Matrix(candidate, replace(packed, tied=candidate.tied), text)


def _floats(arrays: Arrays, name: str, skeleton: Skeleton, parameter: str) -> str:
    return arrays.of_floats(name, skeleton.load(parameter, torch.float32))


def _tables(arrays: Arrays, matrices: dict[str, Matrix], skeleton: Skeleton, layers: int) -> None:
    """Norms, rotary frequencies, last tokens, and the structures that point at everything."""
    rows = []
    for i in range(layers):
        path = f"model.layers.{i}"
        norms = [
            _floats(arrays, f"llama_layers_{i}_{name}_norm", skeleton, f"{path}.{norm}.weight")
            for name, norm in (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm"))
        ]
        fields = [f".{key} = {matrices[f'{path}.{end}'].text}" for key, end in LINEAR.items()]
        fields += [f".attention_norm = {norms[0]}", f".mlp_norm = {norms[1]}"]
        rows.append("{" + ",\n ".join(fields) + "},\n")
    _floats(arrays, "llama_norm", skeleton, "model.norm.weight")
    arrays.of_floats("llama_frequencies", skeleton.model.get_buffer("model.rotary_emb.inv_freq"))
    arrays.of_tokens("llama_eos", last_tokens(skeleton))
    write = arrays.stream.write
    write(f"static const struct llama_layer llama_layers[{layers}] = {{\n{''.join(rows)}}};\n")
    table = matrices["model.embed_tokens"]
    write(f"static const struct llama_matrix llama_embedding = {table.text};\n")
    if "lm_head" in table.candidate.tied:
        write("#define llama_head llama_embedding\n")
    else:
        write(f"static const struct llama_matrix llama_head = {matrices['lm_head'].text};\n")
    arrays.bytes += layers * LAYER + MATRIX * (1 if "lm_head" in table.candidate.tied else 2)


def last_tokens(skeleton: Skeleton) -> list[int]:
    """Ids that end a text, as transformers' generate takes them; [-1] where there are none."""
    file = skeleton.checkpoint.folder / "generation_config.json"
    try:
        found = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); mend or remove it") from error
    found = skeleton.config.eos_token_id if found is None else found
    return [-1] if found is None else list(found) if isinstance(found, list) else [found]


def _macros(shape: dict[str, Any]) -> str:
    shown = {key: value for key, value in shape.items() if key != "context"}
    shown["epsilon"] = f"{shape['epsilon']:.9g}f"
    return "\n".join(f"#define LLAMA_{key.upper()} {value}" for key, value in shown.items())


def ram_bytes(shape: dict[str, Any], context: int) -> int:
    """What llama.c's only buffer takes."""
    keys, queries = (shape[key] * shape["head"] for key in ("kv_heads", "heads"))
    cache = 2 * shape["layers"] * context * keys
    return 4 * (cache + context + 2 * (shape["width"] + queries + shape["inner"]) + 2 * (shape["head"] // 2))


def _device(matrices: list[Matrix], shape: dict[str, Any], flash: int) -> dict[str, int]:
    """What a device must have."""
    tables = [m for m in matrices if m.stored.table]
    head = next((m for m in tables if m.candidate.head), tables[0])
    context = shape["context"]
    return {
        "flash_bytes": flash,
        "ram_bytes": ram_bytes(shape, context),
        "context": context,
        "macs_per_token": sum(m.products for m in matrices if not m.stored.table) + head.products,
        "macs_of_the_head": head.products,
        "macs_of_attention": 2 * shape["layers"] * shape["heads"] * shape["head"] * context,
    }


def _values(numbers: Numbers, matrices: list[Matrix]) -> dict[str, Any]:
    """``values``: where the codes came from; ``rounded``: the kinds of matrices that have none beside the model."""
    values, warnings = numbers.describe(), [*numbers.warnings]
    left = [m for m in matrices if not _coded(numbers, m.candidate)]
    if numbers.codes is not None and left:
        kinds = values["rounded"] = sorted({m.packed.values for m in left})
        warnings.append(
            f"{len(left)} matrices have no codes beside the model and are the nearest {', '.join(kinds)} to each "
            f"weight alone; the first is {left[0].candidate.source}"
        )
    return {"values": values, "warnings": warnings}
