"""Packed folders in transformers: loaded, run, generated from, trained through, saved, made dense; and refused."""

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.errors import UserError
from llmsparse.eval.evaluate import evaluate
from llmsparse.quantizer import register
from tests.packed_tiny import IDS, add_grid, packed, sparse
from tests.pruned import tensors

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "opt", "gpt_neox", "mixtral")
KINDS = (None, "int8", "int4:32")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def dense(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_the_pruned_one_does(tmp_path: Path, family: str) -> None:
    folder = packed(tmp_path, family)
    model, exact = llmsparse.load(folder, dtype=torch.float32), logits(dense(tmp_path / "sparse"))
    assert any(type(m).__name__ == "SparseLinear" for m in model.modules())
    torch.testing.assert_close(logits(model), exact)
    half, other = (
        f(tmp_path / n, dtype=torch.bfloat16) for f, n in ((llmsparse.load, "packed"), (dense, "sparse"))
    )
    errors = [(logits(each).float() - exact).square().mean().sqrt() for each in (half, other)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_again_and_made_dense_it_stays_the_same_model(
    tmp_path: Path, family: str, values: str | None
) -> None:
    folder = packed(tmp_path, family, values)
    model = llmsparse.load(folder, dtype=torch.float32)
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    old, new = tensors(folder), tensors(tmp_path / "again")
    assert old.keys() == new.keys()
    integers = [name for name in old if not old[name].is_floating_point() or name.endswith(".scales")]
    assert integers and all(torch.equal(old[name], new[name]) for name in integers)
    torch.testing.assert_close(logits(llmsparse.load(tmp_path / "again", dtype=torch.float32)), before)
    ordinary = model.dequantize()
    assert not any(type(m).__name__.startswith(("Packed", "SparseLinear")) for m in ordinary.modules())
    torch.testing.assert_close(logits(ordinary), before)
    ordinary.tie_weights()
    ordinary.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense(tmp_path / "dense")), before)


def test_a_tied_head_multiplies_by_the_only_copy_of_the_table(tmp_path: Path) -> None:
    model = llmsparse.load(packed(tmp_path, "gemma3_text", "int8"), dtype=torch.float32)
    assert sum("codes" in name for name in model.state_dict()) == 1
    assert model.lm_head.table is model.model.embed_tokens
    assert model.model.embed_tokens(IDS).abs().mean() > 2, "Gemma's embedding still scales its rows"
    model.tie_weights()
    clone = copy.deepcopy(model)
    assert clone.lm_head.table is clone.model.embed_tokens
    torch.testing.assert_close(logits(clone), logits(model))


def test_codes_beside_a_pruned_model_give_the_logits_that_eval_scored(tmp_path: Path) -> None:
    from llmsparse.checkpoint import Checkpoint
    from llmsparse.eval.models import load_model
    from llmsparse.export import export

    add_grid(sparse(tmp_path / "sparse"))
    export(tmp_path / "sparse", tmp_path / "packed")
    scored = load_model(Checkpoint(tmp_path / "sparse"), torch.float32, torch.device("cpu"), False)
    torch.testing.assert_close(
        logits(llmsparse.load(tmp_path / "packed", dtype=torch.float32)), logits(scored)
    )


def test_shards_device_map_and_the_links_of_a_hub_cache_load(tmp_path: Path) -> None:
    folder = packed(tmp_path, max_shard_size="40KB")
    expected = logits(dense(tmp_path / "sparse"))
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        model = llmsparse.load(snapshot, dtype=torch.float32, **options)
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("values", KINDS)
def test_generation_with_a_cache_and_padded_batches_equals_the_dense_models(
    tmp_path: Path, values: str | None
) -> None:
    model = llmsparse.load(packed(tmp_path, "qwen3", values), dtype=torch.float32)
    ordinary = copy.deepcopy(model).dequantize()
    ids = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 10]])
    options = {
        "attention_mask": (ids != 1).long(),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 1,
    }
    written = model.generate(ids, **options)
    if values in (None, "bf16", "fp16", "fp32"):
        assert torch.equal(written, ordinary.generate(ids, **options))
    else:  # the kernels round activations to 8 bits and a sign: one step after a cache is near, not equal
        known = {"attention_mask": options["attention_mask"]}
        past = model(
            ids[:, :-1], attention_mask=known["attention_mask"][:, :-1], use_cache=True
        ).past_key_values
        step = model(ids[:, -1:], past_key_values=past, **known).logits[:, -1]
        wanted = ordinary(ids, **known).logits[:, -1]
        assert (step - wanted).norm() < 0.02 * wanted.norm()
    alone = model.generate(ids[:1, 2:], max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert torch.equal(written[0, 2:][: alone.shape[1]], alone[0])


@pytest.mark.parametrize("values", KINDS)
def test_gradients_reach_the_input_and_the_other_parameters(tmp_path: Path, values: str | None) -> None:
    model = llmsparse.load(packed(tmp_path, "qwen2", values), dtype=torch.float32)
    ordinary = copy.deepcopy(model).dequantize()
    found = []
    for each in (model, ordinary):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embedded).logits.square().mean().backward()
        norm, bias = each.model.layers[0].input_layernorm.weight, each.model.layers[0].self_attn.q_proj.bias
        found.append((embedded.grad, norm.grad, bias.grad))
    torch.testing.assert_close(found[0], found[1])
    layer = model.model.layers[0].mlp.up_proj.to(torch.float64)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_packed_weights_refuse_to_be_trained_and_say_why(tmp_path: Path) -> None:
    model = llmsparse.load(packed(tmp_path, values="int8"), dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(UserError, match="packed weights cannot be trained.*model.dequantize"):
        layer.requires_grad_()
    layer.scales.requires_grad_()
    with pytest.raises(UserError, match="packed weights cannot be trained"):
        model(IDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("values", KINDS)
def test_a_layer_compiles_without_a_graph_break(tmp_path: Path, values: str | None) -> None:
    model = llmsparse.load(packed(tmp_path, "gemma3_text", values), dtype=torch.float32)
    layer, x = model.model.layers[0].mlp, torch.randn(1, 4, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    embedding = torch.compile(model.model.embed_tokens, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(embedding(IDS), model.model.embed_tokens(IDS))


def test_packed_numbers_are_never_recast(tmp_path: Path) -> None:
    folder = packed(tmp_path, values="int8")
    model = llmsparse.load(folder, dtype=torch.float32).to(torch.float16)
    old, state = tensors(folder), model.state_dict()
    for name, tensor in old.items():
        if not tensor.is_floating_point() or name.endswith(".scales"):
            assert torch.equal(state[name], tensor)
    assert logits(model).dtype == torch.float16


def test_eval_reads_packed_folders(tmp_path: Path, text: str) -> None:
    packed(tmp_path)
    options = {"data": text, "context": 32, "windows": 2, "dtype": "float32"}
    found, wanted = (evaluate(tmp_path / name, **options)["sources"][0] for name in ("packed", "sparse"))
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)


def test_registering_twice_is_no_harm_and_importing_llmsparse_registers_nothing() -> None:
    register()
    register()
    code = "import sys, llmsparse; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# What is refused.


def edit(folder: Path, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q: q.update(version=2), "packed format version 2 is unknown, this llmsparse reads 1"),
        (lambda q: q.pop("version"), "version None is unknown"),
        (lambda q: q.pop("weights"), "quantization_config.weights is None"),
        (lambda q: q["weights"][LAYER].pop("nnz"), f"{LAYER} has nnz None"),
        (
            lambda q: q["weights"][LAYER].update(shape=[32, 64]),
            f"{LAYER} is packed as .32, 64., but the model",
        ),
        (lambda q: q["weights"].update({"model.no": q["weights"][LAYER]}), "has no module 'model.no'"),
        (lambda q: q["weights"].update({"model.norm": q["weights"][LAYER]}), "model.norm is a LlamaRMSNorm"),
        (lambda q: q["weights"][LAYER].update(values="fp32"), f"{LAYER}.values is int16"),
        (lambda q: q["weights"][LAYER].update(nnz=9, size=9), f"{LAYER}.values is int16"),
        (lambda q: q["weights"][LAYER].update(tied=["lm_head"]), "holds no packed weight that is tied"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    folder = packed(tmp_path)
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        llmsparse.load(folder)


def test_missing_and_damaged_tensors_are_named(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    file = folder / "model.safetensors"
    whole = tensors(folder)
    save_file({k: v for k, v in whole.items() if k != f"{LAYER}.mask"}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{LAYER}.mask is missing"):
        llmsparse.load(folder)
    whole[f"{LAYER}.mask"][0, 0] ^= 1
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{LAYER}.mask has .* bits set, but config.json says nnz"):
        llmsparse.load(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        llmsparse.load(folder)


@pytest.mark.parametrize("way", ["packed", "measured"])
def test_loading_holds_the_packed_weights_and_about_a_block_more(tmp_path: Path, way: str) -> None:
    """A model of 40 MB in bf16 that packs to 17 MB: the peak above the imports is nowhere near the dense size."""
    from tests.tiny import FAMILIES as CONFIGS

    config = CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 6
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = 64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.shape[0] != config.vocab_size:
                parameter.masked_fill_(torch.rand(parameter.shape) < 0.8, 0.0)
    model.save_pretrained(tmp_path / "sparse")
    dense_bytes = sum(p.nbytes for p in model.parameters())
    llmsparse.export(tmp_path / "sparse", tmp_path / "packed")
    size = sum(t.nbytes for t in tensors(tmp_path / "packed").values())
    code = """
import sys, torch
import transformers.models.llama.modeling_llama, safetensors.torch
import llmsparse, llmsparse.quantizer
from benchmarks.process import resident
llmsparse.load(sys.argv[2])(torch.arange(4)[None])  # what the first load of a process imports and sets up
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
model = llmsparse.load(sys.argv[1])
model(torch.arange(4)[None])  # pages that were only mapped so far are read
print(resident("VmHWM") - before)
"""
    small = packed(tmp_path / "small")
    environment = {**os.environ, "LLMSPARSE_PRODUCTS": way, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    peak = []
    for folder in ("packed", "sparse"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / folder), str(small)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        peak.append(int(done.stdout.split()[-1]))
    block = dense_bytes / config.num_hidden_layers
    copies = 0  # of the kinds of layer that are faster dense on this machine, as it was timed to be just now
    if way == "measured":
        timed = json.loads((tmp_path / "cache" / "llmsparse" / "products.json").read_text())
        faster = [kind for kind, (ours, dense) in timed.items() if dense < ours]
        shapes = [p.shape for name, p in model.named_parameters() if name.startswith("model.layers.")]
        copies = sum(2 * s.numel() for s in shapes if any(f" {'x'.join(map(str, s))}, " in k for k in faster))
    print(peak, size, block, dense_bytes, copies)
    assert peak[0] < size + block + copies + (8 << 20), "8 MB: torch's first products"
    assert peak[1] > dense_bytes, "the measurement sees a dense model"


def test_safetensors_of_a_packed_folder_hold_what_config_json_announces(tmp_path: Path) -> None:
    folder = packed(tmp_path, values="int4:32")
    entries = json.loads((folder / "config.json").read_text())["quantization_config"]["weights"]
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        names = set(opened.keys())
    assert {f"{path}.scales" for path in entries} <= names


@pytest.mark.parametrize("assign", [False, True])
def test_another_state_dict_is_checked_and_used(tmp_path: Path, assign: bool) -> None:
    """Other zeros in the same places' count: where rows start must be found anew."""
    model = llmsparse.load(packed(tmp_path, "llama", "int8"), dtype=torch.float32)
    model(IDS)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = state[f"{LAYER}.mask"]
    state[f"{LAYER}.mask"] = mask.flip(0).contiguous()
    model.load_state_dict(state, assign=assign)
    ordinary = copy.deepcopy(model).dequantize()
    torch.testing.assert_close(logits(model), logits(ordinary), rtol=0.02, atol=0.02)
    state[f"{LAYER}.mask"] = mask | 1
    with pytest.raises(UserError, match=f"{LAYER}.mask has .* bits set"):
        model.load_state_dict(state, assign=assign)


def test_a_deleted_model_frees_its_packed_weights(tmp_path: Path) -> None:
    model = llmsparse.load(packed(tmp_path, "llama", "int8"), dtype=torch.float32)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()  # through the operators
    watched = weakref.ref(model.get_submodule(LAYER).mask)
    del model
    gc.collect()
    assert watched() is None
