"""Two processes share one run."""

import json
import subprocess
import sys

import pytest
import torch

from llmsparse.prune import prune
from tests.pruned import ONE_THREAD, read_report, tensors
from tests.tiny import save_tiny


def launch(*arguments, program=("-m", "llmsparse", "prune")):
    """The command in two processes (accelerate starts only one on a machine without GPUs, unless told so)."""
    how = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    start = [sys.executable, "-m", "accelerate.commands.launch", *how.split(), *program]
    return subprocess.run(
        [*start, *map(str, arguments)], capture_output=True, text=True, env=ONE_THREAD, check=False
    )


@pytest.mark.parametrize(
    ("family", "solver", "targets", "allocate", "others"),
    [
        ("qwen3_moe", "sparsegpt", "pruned", "uniform", {}),
        ("llama", "sparsegpt", "dense", "error", {}),
        ("llama", "wanda", "pruned", "uniform", {"calibration": "self", "pattern": "2:4", "permute": True}),
    ],
)
def test_two_processes_give_the_single_processs_masks(
    family, solver, targets, allocate, others, tmp_path, text
):
    source = save_tiny(family, tmp_path / "source")
    options = {
        "allocate": allocate,
        "calibration": text,
        "samples": 5,
        "sequence_length": 32,
        "solver": solver,
        "targets": targets,
        "include": "lm_head",
        **others,
    }
    prune(source, tmp_path / "one", **options)
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not True]
    flags = [f"--{key}" for key, value in options.items() if value is True]
    done = launch(source, tmp_path / "two", *given, *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["options"]["processes"] == 2  # one process spoke, and only once
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    equal = sum(int(((one[k] == 0) == (two[k] == 0)).sum()) for k in one)
    assert equal >= 0.999 * sum(v.numel() for v in one.values())
    first, second = (
        {w["name"]: (w["pattern"], w["tokens"]) for w in read_report(tmp_path / f)["weights"]}
        for f in ("one", "two")
    )
    assert first == second
    used = [read_report(tmp_path / f)["calibration"]["tokens_sha256"] for f in ("one", "two")]
    assert used[0] == used[1]


def test_two_processes_train_the_same_block(tmp_path, text):
    """Masks are chosen before the training; of the first block they are those of a single process."""
    source, options = save_tiny("llama", tmp_path / "source"), {"calibration": text, "sequence_length": 32}
    alone = prune(source, tmp_path / "one", samples=12, **options)
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    done = launch(source, tmp_path / "two", *given, "--samples=12", "--reconstruct=2", "--json")
    assert done.returncode == 0, done.stderr
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for record in json.loads(done.stdout)["weights"]:
        assert record["block_error"]["after"] < record["block_error"]["before"]
        if ".layers.0." in record["name"]:
            zeros = [(weights[record["name"]] == 0) for weights in (one, two)]
            assert (zeros[0] == zeros[1]).double().mean() > 0.999
            assert not torch.equal(one[record["name"]], two[record["name"]])
    assert len(alone["weights"]) == 21


def test_an_error_in_two_processes_is_told_once_and_ends_both(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    done = launch(
        source, tmp_path / "two", "--calibration", text, "--samples", 100_000, "--sequence-length", 64
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "the largest --samples" in done.stderr
    assert not (tmp_path / "two").exists()


def test_processes_wait_for_one_that_is_busy_for_long(tmp_path):
    script = tmp_path / "told.py"
    script.write_text(
        "import torch\n"
        "from torch import distributed as dist\n"
        "from llmsparse.processes import PATIENCE, Processes\n"
        "processes = Processes('cpu')\n"
        "waits = dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout\n"
        "assert waits == PATIENCE, waits\n"
        "processes.close()\n"
    )
    done = launch(program=[str(script)])
    assert done.returncode == 0, done.stderr
