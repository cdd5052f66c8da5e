"""export --format c-header: the C program says what Python says, fits where it claims to, and needs no heap."""

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmsparse
from llmsparse import render
from llmsparse.documents import builtin_documents
from llmsparse.errors import UserError
from llmsparse.export import export
from tests.packed_tiny import add_grid, sparse
from tests.tiny import GATED, save_tiny, tokenizer

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
BUILDS = {  # name -> compiler and options, how its programs are started
    "host": (("gcc", *STRICT, "-O2"), ()),
    "sanitizers": (("gcc", *STRICT, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"), ()),
    "arm": (("arm-linux-gnueabihf-gcc", *STRICT, "-O2", "-static"), ("qemu-arm",)),
}
CONTEXT = 128  # of the tiny models

c_export = partial(export, format="c-header")


class Exported(NamedTuple):
    """A model in C, and the same weights in torch."""

    folder: Path
    result: dict[str, Any]
    reference: Any


def call(*command: object, code: int = 0) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (command, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


def build(name: str, folder: Path, *options: str) -> tuple[str, ...]:
    """Compile the program of ``folder``: the command that starts it, for COUNT and ids to follow."""
    compiler, starter = BUILDS[name]
    for tool in (compiler[0], *starter):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    program = folder.parent / f"{folder.name}-{name}{len(options)}"
    call(*compiler, "-DLLAMA_MAIN", *options, folder / "llama.c", "-o", program, "-lm")
    return (*starter, str(program))


def spoken(command: tuple[str, ...], prompt: list[int], count: int = CONTEXT) -> list[int]:
    return [int(token) for token in call(*command, count, *prompt).split()]


@torch.no_grad()
def expected(model: Any, prompt: list[int], context: int = CONTEXT) -> list[int]:
    """Greedy tokens in float32, until the text ends or the context is full."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": context + 1 - len(prompt), "do_sample": False, "pad_token_id": 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def text_ids() -> torch.Tensor:
    text = "\n\n".join(builtin_documents())[
        20_000:23_000
    ]  # short, so that a small model learns what comes next
    return torch.tensor(tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"])


def trained(folder: Path) -> None:
    """A llama of a million weights that learned a page of text, in about 12 s."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "tie_word_embeddings": True,
    }
    steps, length, ids = 110, 64, text_ids()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**GATED | sizes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            windows = torch.stack([ids[i : i + length] for i in torch.randint(len(ids) - length, (16,))])
            model(input_ids=windows, labels=windows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    with torch.inference_mode(False), torch.enable_grad():
        trained(folder / "dense")
    llmsparse.prune(folder / "dense", folder / "pruned", solver="magnitude", pattern="50%")
    return folder / "pruned"


@pytest.fixture(scope="module", params=["int8", "int4:32"])
def million(request: pytest.FixtureRequest, pruned: Path) -> Exported:
    return exported(pruned, request.param)


@pytest.fixture(scope="module")
def answers(million: Exported) -> dict[int, list[int]]:
    """Python's tokens after prompts of so many."""
    return {length: expected(million.reference, prompt(length)) for length in (1, 30, 127, 128)}


def prompt(length: int) -> list[int]:
    return [0, *text_ids()[200 : 199 + length].tolist()]


def exported(source: Path, values: str | None = None) -> Exported:
    """``source`` as C, and, through the packed format, as an ordinary float32 model."""
    kind = (values or "codes").replace(":", "-")
    folder, packed = source.with_name(f"{kind}-c"), source.with_name(f"{kind}-packed")
    export(source, packed, values=values)
    reference = llmsparse.load(packed, dtype=torch.float32).dequantize().eval()
    return Exported(folder, c_export(source, folder, values=values), reference)


@pytest.mark.parametrize("name, lengths", [("host", (1, 30, 127, 128)), ("sanitizers", (30, 127)),
                                           ("arm", (30, 127))])  # fmt: skip
def test_greedy_tokens_equal_pythons(
    million: Exported, answers: dict[int, list[int]], name: str, lengths: tuple[int, ...]
) -> None:
    command = build(name, million.folder)
    for length in lengths:
        found = spoken(command, prompt(length))
        assert found == answers[length]
        assert length > 64 or (len(found) == 129 - length and len(set(found)) > 9), (
            "the text is no loop of a few"
        )


def test_one_step_after_another_says_what_generate_says(million: Exported, tmp_path: Path) -> None:
    (tmp_path / "steps.c").write_text(
        '#include <stdio.h>\n#include "model.h"\nint main(void) {\n    int out[20], token = 5;\n'
        "    int prompt[1] = {5}, bad[2] = {5, LLAMA_VOCAB}, count = llama_generate(prompt, 1, out, 20);\n"
        "    for (int i = 0; i < count; i++)\n        if ((token = llama_step(token, i)) != out[i]) return 1;\n"
        '    printf("%d %d %d %d %d %d %d", count, llama_step(-1, 0), llama_step(0, LLAMA_CONTEXT), llama_step(0, -1),\n'
        "           llama_generate(prompt, 0, out, 1), llama_generate(bad, 2, out, 1),\n"
        "           llama_generate(prompt, 1, out, 0));\n"
        "    return 0;\n}\n"
    )
    folder = million.folder
    call(
        *BUILDS["host"][0],
        "-I",
        folder,
        folder / "llama.c",
        tmp_path / "steps.c",
        "-o",
        tmp_path / "steps",
        "-lm",
    )
    assert call(tmp_path / "steps") == "20 -3 -2 -2 -1 -3 0"


def test_a_prompt_that_has_no_room_is_an_error_and_the_context_is_a_macro(million: Exported) -> None:
    command, ids = build("sanitizers", million.folder, "-DLLAMA_CONTEXT=16"), text_ids()[:17].tolist()
    assert "error -2: give COUNT and 1 to 16 token ids from 0 to 127" in call(*command, 4, *ids, code=2)
    assert "error -3" in call(*command, 4, 128, code=2) and "error -1" in call(*command, 4, code=2)
    assert spoken(command, ids[:5]) == expected(million.reference, ids[:5], 16)
    for context in (0, 129):
        compile_ = (
            *BUILDS["host"][0],
            f"-DLLAMA_CONTEXT={context}",
            "-c",
            million.folder / "llama.c",
            "-o",
            "/dev/null",
        )
        assert "LLAMA_CONTEXT must be 1 to LLAMA_MAX_CONTEXT" in call(*compile_, code=1)


def test_the_object_needs_the_maths_library_alone_and_no_heap(million: Exported, tmp_path: Path) -> None:
    call(
        *BUILDS["host"][0],
        "-fno-stack-protector",
        "-c",
        million.folder / "llama.c",
        "-o",
        tmp_path / "llama.o",
    )
    needs = {line.split()[-1] for line in call("nm", "-u", tmp_path / "llama.o").splitlines()}
    assert needs - {"_GLOBAL_OFFSET_TABLE_"} <= {
        "cosf",
        "sinf",
        "sincosf",
        "expf",
        "sqrtf",
        "memcpy",
        "memset",
    }


@pytest.mark.parametrize("option", ["-DLLAMA_DATA", "-ULLAMA_DATA"])
def test_the_header_compiles_alone_without_a_warning(million: Exported, tmp_path: Path, option: str) -> None:
    (tmp_path / "alone.c").write_text('#include "model.h"\nint sizes[LLAMA_CONTEXT];\n')
    call(
        *BUILDS["host"][0],
        option,
        "-I",
        million.folder,
        "-c",
        tmp_path / "alone.c",
        "-o",
        tmp_path / "alone.o",
    )


def test_flash_and_ram_are_what_the_compiler_takes(million: Exported, tmp_path: Path) -> None:
    compiler = BUILDS["arm"][0][0]
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    call(compiler, "-std=c99", "-O0", "-c", million.folder / "llama.c", "-o", tmp_path / "llama.o")
    found = re.findall(r"^\w+ (\w+) (\w) llama_", call("nm", "-S", tmp_path / "llama.o"), flags=re.MULTILINE)
    sizes = {k: sum(int(size, 16) for size, kind in found if kind in k) for k in ("rd", "b")}
    device = million.result["device"]
    assert sizes == {"rd": device["flash_bytes"], "b": device["ram_bytes"]}
    stored = million.result["linear"]["after"] + million.result["embeddings"]["after"]
    assert stored < device["flash_bytes"] < stored + 12_000, "norms, frequencies, structures, ends of arrays"
    assert json.loads((million.folder / "export.json").read_text())["device"] == device


def test_multiply_accumulates_are_those_of_kept_weights(million: Exported) -> None:
    weights = million.reference.state_dict()
    kept = sum(int((w != 0).sum()) for name, w in weights.items() if "_proj" in name)
    device, head = million.result["device"], weights["lm_head.weight"].numel()
    assert (device["macs_per_token"], device["macs_of_the_head"]) == (kept + head, head)
    assert device["macs_of_attention"] == 2 * 5 * 128 * CONTEXT


@pytest.mark.parametrize("family, context", [("llama", 128), ("qwen2", 128), ("mistral", 8)])
def test_every_family_with_its_biases_own_head_and_window(tmp_path: Path, family: str, context: int) -> None:
    made = exported(sparse(tmp_path / "sparse", family), "int4:32")
    command = build("sanitizers", made.folder)
    assert made.result["device"]["context"] == context, (
        "mistral's window is 8 tokens; within it nothing slides"
    )
    for ids in ([3], [5, 60, 7, 99, 11, 100]):
        assert spoken(command, ids) == expected(made.reference, ids, context)


@pytest.mark.parametrize("grid", ["int8", "int4:32"])
def test_codes_beside_the_model_are_stored_and_dense_weights_take_no_mask(tmp_path: Path, grid: str) -> None:
    add_grid(sparse(tmp_path / "sparse", keep=0.95), grid)
    codes = exported(tmp_path / "sparse")
    assert codes.result["values"]["kinds"] == [grid] and codes.result["values"]["rounded"] == ["int8"]
    assert codes.result["layouts"]["dense"] > 2
    kept = codes.reference
    found = c_export(tmp_path / "sparse", tmp_path / "again", embeddings="int8")
    assert (tmp_path / "again" / "model.h").read_bytes() == (codes.folder / "model.h").read_bytes()
    assert found["device"] == codes.result["device"]
    for path in ("model.embed_tokens", "lm_head"):  # those codes are none of the packed export's
        table = kept.get_submodule(path).weight.data
        grid8 = llmsparse.grid.Grid.parse("int8")
        each, scales = grid8.nearest(table, table != 0)
        table.copy_(grid8.values(each, scales))
    assert spoken(build("host", codes.folder), [3, 4, 5]) == expected(kept, [3, 4, 5])


def test_what_it_cannot_hold_is_refused_in_words_and_leaves_nothing(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "llama")
    for family in ("gemma2", "gemma3_text", "qwen3", "gpt2", "mixtral"):
        save_tiny(family, tmp_path / family)
        with pytest.raises(
            UserError, match=f"has model_type {family}; it runs llama, mistral, qwen2; use --format"
        ):
            c_export(tmp_path / family, tmp_path / "o")
    for options in ({"values": "bf16"}, {"embeddings": "keep"}, {"values": "fp32"}):
        with pytest.raises(
            UserError, match="was asked for; --format c-header stores int8 or int4:32 codes only"
        ):
            c_export(source, tmp_path / "o", **options)
    with pytest.raises(UserError, match="values 'int3' are unknown"):
        c_export(source, tmp_path / "o", values="int3")
    config = json.loads((source / "config.json").read_text())
    for key, value, reason in (
        ("hidden_act", "gelu", "hidden_act gelu; it runs silu"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "rope_type linear; it runs",
        ),
    ):
        (source / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=reason):
            c_export(source, tmp_path / "o")
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))


def test_output_is_the_same_twice_and_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sparse(tmp_path / "sparse")
    (tmp_path / ".o.llmsparse-new").mkdir()  # of an export that was killed
    result = export(source, tmp_path / "o", format="c-header")
    before = {file.name: file.read_bytes() for file in (tmp_path / "o").iterdir() if file.suffix != ".json"}
    assert sorted(before) == ["llama.c", "model.h"]
    assert result["device"]["flash_bytes"] < result["bytes"]["after"]
    with pytest.raises(UserError, match="exists and is not empty"):
        c_export(source, tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr("llmsparse.c_arrays.Arrays.of_tokens", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            c_export(source, tmp_path / "o", overwrite=True, values="int4:32")
    for values, same in (("int8", True), ("int4:32", False)):
        assert all((tmp_path / "o" / name).read_bytes() == data for name, data in before.items())
        c_export(source, tmp_path / "o", overwrite=True, values=values)
        assert ((tmp_path / "o" / "model.h").read_bytes() == before["model.h"]) is same
    assert sorted(file.name for file in tmp_path.iterdir()) == ["o", "sparse"]


def test_the_command_prints_what_a_device_must_have(million: Exported) -> None:
    device = million.result["device"]
    lines = [str(line) for line in render.export(million.result).renderables[1:]]
    kib = {key: f"{device[key] / 1024:.4g} KiB" for key in ("flash_bytes", "ram_bytes")}
    wanted = f"{kib['flash_bytes']} of constants (flash), {kib['ram_bytes']} of RAM for a context of 128"
    assert wanted in lines[1]
    assert f"a token: {device['macs_per_token']:,} multiply-accumulates" in lines[2]
    assert lines[-1] == f"next: cc -O3 -DLLAMA_MAIN {million.folder / 'llama.c'} -lm"
