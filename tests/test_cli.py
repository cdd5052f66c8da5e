"""The command line: the functions' own options; output and exit codes that a script can rely on."""

import errno
import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llmsparse import __version__, plugins
from llmsparse.cli import PYTHON_ONLY, SHELLS, app
from llmsparse.errors import UserError
from llmsparse.recipe import Recipe
from tests.tiny import save_tiny

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
WEIGHTS = [
    {"name": f"model.layers.{i}.mlp.up_proj", "shape": [8, 4], "pattern": "1:4", "sparsity": 0.75, "error": e}
    for i, e in ((0, 0.125), (1, 0.25))
]
COVERAGE = {"pruned_parameters": 64, "linear_parameters": 128, "all_parameters": 256}
# fmt: off
REPORT = {
    "model": "some/model", "out": "pruned", "weights": WEIGHTS, "coverage": COVERAGE,
    "seconds": {"observe": 60.0, "solve": 61.0}, "peak_memory": {"observe": 3 << 20, "solve": 5 << 20},
    "warnings": ["layer [0] saw few tokens"],
}
PLAN = {
    "model": "some/model", "weights": WEIGHTS, "coverage": COVERAGE, "read_bytes": 2048, "write_bytes": 1024,
    "peak_host_bytes": 3 << 30, "peak_device_bytes": 0, "seconds_estimate": 8000.0,
    "solver": "wanda", "calibration": "builtin, 64 x 512",
}
SOURCE = {
    "name": "wikitext2", "data": "WikiText-2", "sha256": "ab" * 32, "perplexity": 12.345678, "standard_error": 0.25,
    "word_perplexity": 45.6, "word_standard_error": None, "byte_perplexity": None, "byte_standard_error": None,
    "tokens": 1022, "windows": 2,
}
BESIDE = {
    "dense_perplexity": 10.0, "dense_standard_error": 0.2, "kl": 0.5, "kl_standard_error": 0.01,
    "top1_agreement": 0.75, "top5_agreement": 0.9,
}
PLACE = {"from": 1, "to": 31, "tokens": 62, "perplexity": 99.0, **BESIDE}
TASK = {
    "task": "arc_easy", "metric": "acc_norm", "value": 0.5, "standard_error": 0.02, "chance": 0.25, "items": 500,
    "of": 2376, "data": "arc_easy.jsonl", "sha256": "cd" * 32,
}
PAIRED = {
    "dense_value": 0.6, "dense_standard_error": 0.02, "lost": 70, "gained": 20, "ability": "71 % (60 to 83)",
}
CAPABILITIES = [
    {"capability": "knowledge", "tasks": ["arc_easy"], "measurable": ["arc_easy"], "ability_kept": 0.714,
     "status": "measured"},
    {"capability": "code", "tasks": [], "measurable": [], "ability_kept": None, "status": "not measured"},
]
GENERATION = {
    "new_tokens": 64, "repetition": 0.5, "terminated": 0.25, "dense_repetition": 0.1, "dense_terminated": 1.0,
    "samples": [{"prompt": "Once\nupon", "continuation": "a a a", "dense_continuation": "a time"}],
}
FIGURES = {
    "model": "pruned", "context": 512, "stride": None, "bos": "none", "dtype": "float32", "device": "cpu",
    "sources": [SOURCE],
}
TOTALS = {
    "weight_sparsity": 0.5, "weight_parameters": 32, "sparsity": 0.25, "parameters": 64, "negative_zeros": 3,
}
# fmt: on
ZEROS = {
    "weights": [{"name": "w", "shape": [8, 4], "dtype": "bfloat16", "sparsity": 0.5, "pattern": "2:4"}],
    "totals": TOTALS,
}


class Stub:
    """Stands in for a public function, with its signature; remembers its arguments and returns or raises."""

    def __init__(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        shell = SHELLS[command]
        module = importlib.import_module(shell.module)
        self.__signature__ = inspect.signature(getattr(module, shell.function))
        self.given: dict[str, Any] | None = None
        self.answer: Any = None
        monkeypatch.setattr(module, shell.function, self)

    def __call__(self, **given: Any) -> Any:
        self.given = given
        print("a library prints this")
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def stub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return Stub(getattr(request, "param", "prune"), monkeypatch)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def option_names(command: str) -> dict[str, Any]:
    return {p.name: p for p in COMMANDS[command].params}


# Options


@pytest.mark.parametrize("command", SHELLS)
def test_a_commands_options_are_its_functions_parameters(command: str) -> None:
    parameters = inspect.signature(SHELLS[command].load()).parameters
    assert "options" not in parameters
    expected = {name: p for name, p in parameters.items() if name not in PYTHON_ONLY}
    shown = option_names(command)
    assert [*shown] == [*expected, "json"]
    for name, parameter in expected.items():
        default = parameter.default
        if default is inspect.Parameter.empty:
            assert shown[name].required and shown[name].param_type_name == "argument"
            continue
        assert not shown[name].required
        assert shown[name].default == (list(default) if isinstance(default, tuple) else default)
        if shown[name].param_type_name == "option":
            assert shown[name].opts == ["--" + name.replace("_", "-")] and not shown[name].secondary_opts
            assert shown[name].multiple == isinstance(default, tuple)
            assert shown[name].is_flag == isinstance(default, bool)


@pytest.mark.parametrize("command", SHELLS)
def test_every_option_says_what_it_is_for(command: str) -> None:
    assert [name for name, parameter in option_names(command).items() if not parameter.help] == []


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_prune_and_plan_offer_every_field_of_a_recipe(command: str) -> None:
    assert {f.name for f in fields(Recipe)} | {"recipe"} <= set(option_names(command))


def test_only_options_that_were_given_are_passed_so_that_a_recipe_can_hold_the_rest(stub: Stub) -> None:
    stub.answer = REPORT
    assert invoke("prune", "some/model", "out", "--recipe", "r.yaml", "--seed", "0").exit_code == 0
    assert stub.given is not None
    stub.given.pop("progress")
    assert stub.given == {"model": "some/model", "out": "out", "recipe": "r.yaml", "seed": 0}


def test_every_kind_of_option_arrives_in_its_type(stub: Stub) -> None:
    stub.answer = REPORT
    line = (
        "--pattern 50% --pattern mlp=2:4 --set damping=0.02 --set chunk=64 --skip a --include lm_head "
        "--samples 4 --resume --overwrite --trust-remote-code --batch-size auto --cache-dir there"
    )
    assert invoke("prune", "m", "o", *line.split()).exit_code == 0
    assert stub.given is not None
    assert stub.given.pop("progress") is not None
    # fmt: off
    assert stub.given == {
        "model": "m", "out": "o", "pattern": ("50%", "mlp=2:4"), "set": ("damping=0.02", "chunk=64"),
        "skip": ("a",), "include": ("lm_head",), "samples": 4, "resume": True, "overwrite": True,
        "trust_remote_code": True, "batch_size": "auto", "cache_dir": "there",
    }
    # fmt: on


@pytest.mark.parametrize("line", ["prune m", "prune m o --no-resume", "prune m o --samples many", "inspect"])
def test_wrong_usage_exits_with_2_and_writes_nothing_to_stdout(line: str) -> None:
    result = invoke(*line.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error" in result.stderr


# Errors


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_users_error_is_one_line_on_stderr_and_exit_code_2(stub: Stub, flags: list[str]) -> None:
    stub.answer = UserError("pattern '[2:9' is unknown;\n use 2:4")
    result = invoke("prune", "m", "o", *flags)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: pattern '[2:9' is unknown; use 2:4"
    assert "Traceback" not in result.output and "error" not in result.stdout


@pytest.mark.parametrize("stub, hint", [("prune", True), ("plan", False)], indirect=["stub"])
def test_an_interrupted_prune_says_how_to_go_on(stub: Stub, hint: bool) -> None:
    stub.answer = KeyboardInterrupt()
    result = invoke(*(["prune", "m", "o"] if hint else ["plan", "m"]))
    assert result.exit_code == 130
    expected = "interrupted; run the same command with --resume to continue" if hint else "interrupted"
    assert result.stderr == expected + "\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_to_be_one(stub: Stub, error: Exception) -> None:
    stub.answer = error
    result = invoke("prune", "m", "out")
    assert result.exit_code == 2
    assert re.fullmatch(
        r"error: disk full while writing out \(.*\); free some space, .* --resume\n", result.stderr
    )


def test_a_forbidden_folder_is_a_users_error(stub: Stub) -> None:
    stub.answer = PermissionError(errno.EACCES, "Permission denied", "out")
    result = invoke("prune", "m", "out")
    assert result.exit_code == 2
    assert "Permission denied: 'out'; choose a place that you may read and write" in result.stderr


def test_a_bug_keeps_its_traceback(stub: Stub) -> None:
    stub.answer = ZeroDivisionError("a bug")
    result = invoke("prune", "m", "o")
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


# Output


def test_json_is_all_that_stdout_holds(stub: Stub) -> None:
    stub.answer = {**REPORT, "peak": float("inf"), "nan": [float("nan")], "path": Path("x"), "text": "é ±"}
    result = invoke("prune", "m", "o", "--json")
    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert document == {**REPORT, "peak": None, "nan": [None], "path": "x", "text": "é ±"}
    assert "a library prints this" in result.stderr


def test_processes_other_than_the_first_are_silent(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for answer, flags, code in ((REPORT, [], 0), (REPORT, ["--json"], 0), (UserError("no"), [], 2)):
        stub.answer = answer
        result = invoke("prune", "m", "o", *flags)
        assert (result.exit_code, result.stdout, result.stderr) == (code, "", "")
    monkeypatch.setenv("RANK", "0")
    stub.answer = REPORT
    assert "written to" in invoke("prune", "m", "o").stdout


def test_prune_shows_kinds_of_weights_errors_coverage_cost_and_what_is_next(stub: Stub) -> None:
    stub.answer = REPORT
    shown = invoke("prune", "m", "o").stdout
    for expected in (
        "model.layers.*.mlp.up_proj",
        "1:4 (keeps 25 %)",
        "75.0%",
        "0.1250 to 0.2500",
        "64 parameters: 50.0% of all linear, 25.0% of all parameters; 75.00% of them are zero",
        "2 min (observe 1 min, solve 1 min), peak memory 5 MiB",
        "warning: layer [0] saw few tokens",
        "written to pruned",
        "next: llmsparse eval pruned --against some/model",
    ):
        assert expected in shown


@pytest.mark.parametrize("stub", ["plan"], indirect=True)
def test_plan_shows_coverage_bytes_memory_and_time(stub: Stub) -> None:
    stub.answer = PLAN
    shown = invoke("plan", "m").stdout
    for expected in (
        "solver wanda, calibration builtin",
        "reads 2 KiB, writes 1 KiB",
        "host 3 GiB",
        "2 h 13 min",
    ):
        assert expected in shown


@pytest.mark.parametrize("stub", ["eval"], indirect=True)
def test_eval_shows_the_figure_with_its_error_and_what_it_was_measured_on(stub: Stub) -> None:
    stub.answer = FIGURES
    shown = invoke("eval", "m").stdout
    for expected in (
        "12.35 ± 0.25",
        "45.6",
        "1,022 tokens scored in 2 windows",
        "context 512, not overlapping; BOS: none; ± is the standard error over windows",
        "dtype float32, device cpu",
        "ab" * 32,
    ):
        assert expected in shown
    assert "top-1" not in shown and "Zero-shot" not in shown


@pytest.mark.parametrize("stub", ["eval"], indirect=True)
def test_eval_shows_fidelity_tasks_capabilities_and_texts_beside_the_dense_model(stub: Stub) -> None:
    stub.answer = {
        **FIGURES,
        "against": "dense",
        "stride": 128,
        "sources": [{**SOURCE, **BESIDE, "positions": [PLACE]}],
        "tasks": [{**TASK, **PAIRED}],
        "capabilities": CAPABILITIES,
        "lost_most": "knowledge",
        "generation": GENERATION,
    }
    shown = invoke("eval", "m", "--against", "dense", "--tasks", "arc_easy").stdout
    for expected in (
        "0.500 ± 0.010",
        "75 %",
        "90 %",
        "1 to 31",
        "one every 128 tokens",
        "50.0 ± 2.0 %",
        "60.0 ± 2.0 %",
        "500 of 2376",
        "70 / 20",
        "71 % (60 to 83)",
        "71% kept",
        "no task covers it",
        "lost most: knowledge",
        "Once upon",
        "a time",
        "repeated 4-grams 50 %, ended 25 %; dense: 10 %, 100 %",
        "cd" * 32,
    ):
        assert expected in shown
    alone = {**FIGURES, "sources": [], "tasks": [TASK], "capabilities": CAPABILITIES, "lost_most": None}
    stub.answer = alone
    shown = invoke("eval", "m", "--tasks", "arc_easy").stdout
    assert "50.0 ± 2.0 %" in shown and "lost" not in shown and "Perplexity" not in shown


@pytest.mark.parametrize("stub", ["inspect"], indirect=True)
def test_inspect_shows_weights_and_totals(stub: Stub) -> None:
    stub.answer = ZEROS
    shown = invoke("inspect", "m").stdout
    for expected in (
        "8 x 4",
        "bfloat16",
        "2:4",
        "50.00% of 32",
        "25.00% of all 64",
        "3 of the zeros are -0.0",
    ):
        assert expected in shown


@pytest.mark.parametrize("stub", ["demo"], indirect=True)
def test_demo_takes_any_model_and_shows_its_own_table(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["llmsparse.demo"], "show", lambda result: f"table of {result['model']}")
    stub.answer = {"model": "some/model"}
    assert "table of some/model" in invoke("demo", "some/model", "--windows", "3").stdout
    assert stub.given is not None and (stub.given["model"], stub.given["windows"]) == ("some/model", 3)


# The real functions


def test_a_checkpoint_is_planned_pruned_inspected_and_evaluated_from_the_command_line(tmp_path: Path) -> None:
    model, out, text = (
        str(save_tiny("gpt2", tmp_path / "model")),
        str(tmp_path / "out"),
        tmp_path / "text.txt",
    )
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    options = ["--pattern", "2:4", "--calibration", str(text), "--samples", "4", "--sequence-length", "32"]
    plan = json.loads(invoke("plan", model, *options, "--json").stdout)
    report = json.loads(invoke("prune", model, out, *options, "--json").stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [w["name"] for w in plan["weights"]] == [w["name"] for w in report["weights"]]
    zeros = json.loads(invoke("inspect", out, "--json").stdout)
    patterns = [w["pattern"] for w in zeros["weights"] if ".h." in w["name"]]
    assert patterns == ["2:4 (columns)"] * len(plan["weights"])
    arguments = [out, "--data", str(text), "--context", "32", "--windows", "2", "--against", model]
    figures = json.loads(invoke("eval", *arguments, "--json").stdout)
    assert {"context", "bos", "versions"} <= set(figures)
    assert {"perplexity", "tokens", "sha256", "kl", "top5_agreement"} <= set(figures["sources"][0])
    for command, rest in (("plan", [model, *options]), ("inspect", [out]), ("eval", arguments)):
        assert invoke(command, *rest).exit_code == 0
    shown = invoke("prune", model, out, *options, "--overwrite")
    assert shown.exit_code == 0 and "transformer.h.*.attn.c_attn" in shown.stdout


def test_what_prune_refuses_the_command_line_says_in_one_line(tmp_path: Path) -> None:
    model, out = str(save_tiny("llama", tmp_path / "model")), tmp_path / "out"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("patern: 50%")
    out.mkdir()
    (out / "file").touch()
    for arguments, expected in (
        (["--pattern", "5:4"], "n must lie between 1 and m-1"),
        (["--pattern", "1:7"], "needs in_features divisible by 7"),
        (["--solver", "wonda"], "solver 'wonda' is unknown; known: admm, alps, magnitude"),
        (["--set", "dumping=1"], "alps has no such option; it has"),
        (["--set", "damping"], "--set damping is not KEY=VALUE"),
        (["--skip", "("], "--skip '(' is not a regular expression"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--device", "abacus"], "--device abacus"),
        (["--dtype", "int3"], "--dtype int3 is unknown"),
        (
            ["--recipe", str(recipe)],
            "key 'patern' is unknown; did you mean pattern; known: solver, pattern",
        ),
        (["--recipe", "absent.yaml"], "recipe absent.yaml does not exist"),
        (["--solver", "magnitude"], "exists and is not empty; choose another OUT"),
    ):
        result = invoke("prune", model, str(out), *arguments)
        last = result.stderr.splitlines()[-1]
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert last.startswith("error: ") and expected in last


# list, --version, --help


def test_list_names_the_folders_plugins_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "load", pytest.fail)
    result = json.loads(invoke("list", "solvers", "--json").stdout)
    assert [row["name"] for row in result["solvers"]] == plugins.names("solvers")
    assert all(row["about"] for row in result["solvers"])


def test_list_says_what_each_pattern_keeps() -> None:
    shown = invoke("list", "patterns").stdout
    assert re.search(r"1:4 .*keeps 25 %", shown) and re.search(r"3:4 .*keeps 75 %", shown)


def test_list_of_everything_has_every_kind_and_an_unknown_kind_names_them() -> None:
    assert sorted(json.loads(invoke("list", "--json").stdout)) == sorted(["patterns", *plugins.kinds()])
    result = invoke("list", "sovlers")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: kind 'sovlers' is unknown; known: patterns, ")


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"llmsparse {__version__}\n"
    shown = invoke("--help").stdout
    assert all(command in shown and shell.help in shown for command, shell in SHELLS.items())


def test_version_and_help_import_no_torch() -> None:
    code = (
        "import sys; from llmsparse.cli import app\n"
        "for arguments in (['--version'], ['--help'], ['list', 'solvers']):\n"
        "    app(arguments, standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_m_llmsparse_is_the_same_command_line() -> None:
    result = subprocess.run([sys.executable, "-m", "llmsparse", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"llmsparse {__version__}\n", "")
