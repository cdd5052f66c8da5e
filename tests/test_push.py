"""Push: real huggingface_hub against a hub on this machine, with what goes wrong on a network."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from llmsparse.cli import app
from llmsparse.export import export
from llmsparse.prune import prune
from tests import hub_server
from tests.hub_server import Hub, fail, hang_up
from tests.packed_tiny import IDS
from tests.pruned import SMALL
from tests.results import full_evaluation
from tests.tiny import save_tiny

REPO = "someone/tiny-2of4"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content:DeprecationWarning"
)  # huggingface_hub's use of its client


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned folder that knows a path with a user's name, as reports do."""
    home = tmp_path_factory.mktemp("Jane Doe")
    dense = save_tiny("llama", home / "dense model")
    prune(dense, home / "out", pattern="2:4", values="int8", **SMALL)
    return home / "out"


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A hub that huggingface_hub takes for its own in this process, with a home of its own."""
    home = tmp_path_factory.mktemp("home")
    with hub_server.running() as (hub, address):
        hub.address = address
        for name, value in (("ENDPOINT", address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


class Done(NamedTuple):
    stdout: str
    stderr: str


def run(hub: Hub, *words: object, token: str | None = "hf_writes", code: int = 0) -> Done:
    """The command line in this process, whose huggingface_hub is the real one."""
    done = CliRunner().invoke(app, [*map(str, words), *(["--token", token] if token else [])])
    assert done.exit_code == code, (done.output, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return Done(done.stdout, done.stderr)


def large_uploads(hub: Hub) -> int:
    return hub.count("PUT /lfs/")


def assert_complete(hub: Hub, folder: Path, repo: str = REPO, revision: str = "main") -> None:
    """Every file is there once, byte for byte but for cleaned reports and the card."""
    there = hub.content(repo, revision)
    here = {f.name for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")}
    assert set(there) == here | {"README.md"}
    for name in here - {"report.json", "README.md"}:
        assert there[name] == (folder / name).read_bytes()


def test_the_server_has_the_folder_byte_for_byte_in_one_commit(hub, pruned):
    done = run(hub, "push", pruned, REPO, "--json")
    told = json.loads(done.stdout)
    assert_complete(hub, pruned)
    assert told["commit"] == hub.repositories[REPO].branches["main"]["oid"]
    assert not hub.repositories[REPO].private
    assert len(hub.repositories[REPO].commits) == 2  # git's attributes, then everything together


@pytest.mark.parametrize("format", [None, "packed", "dense"])
def test_the_lines_of_the_card_load_the_pushed_model_through_the_hub(hub, pruned, tmp_path, format):
    folder = pruned
    if format is not None:
        export(pruned, tmp_path / "out", format=format)
        folder = tmp_path / "out"
    run(hub, "push", folder, REPO)
    lines = re.search(r"```python\n(.*?)```", hub.content(REPO)["README.md"].decode(), re.DOTALL)
    code = (
        f"{lines[1]}\nimport torch\nfrom llmsparse import load\nids = torch.tensor({IDS.tolist()})\n"
        f"assert torch.equal(model(ids).logits, load({str(folder)!r})(ids).logits)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert loaded.returncode == 0, loaded.stderr


def test_no_local_path_and_no_user_reaches_the_server(hub, pruned):
    run(hub, "push", pruned, REPO)
    report = json.loads((pruned / "report.json").read_text())
    assert "Jane Doe" in report["model"] and "Jane Doe" in report["out"]
    for name, data in hub.content(REPO).items():
        if not name.endswith(".safetensors"):
            assert b"Jane Doe" not in data and str(pruned.parent).encode() not in data, name
            if getpass.getuser() != "root":
                assert getpass.getuser().encode() not in data, name
    assert json.loads(hub.content(REPO)["report.json"])["model"] == "dense model"


def test_a_dry_run_lists_the_files_and_reaches_nothing(hub, pruned):
    told = json.loads(run(hub, "push", pruned, REPO, "--dry-run", "--json").stdout)
    assert hub.requests == [] and told["commit"] is None
    assert {file["path"] for file in told["files"]} == {f.name for f in pruned.iterdir()} | {"README.md"}


def test_private_and_revision_are_as_asked(hub, pruned):
    run(hub, "push", pruned, REPO, "--private", "--revision", "v1")
    assert hub.repositories[REPO].private
    assert_complete(hub, pruned, revision="v1")
    assert hub.content(REPO) == {}


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (hang_up, "PUT /lfs/"),
        (fail(500), "PUT /lfs/"),
        (fail(503), "commit/main"),
        (fail(429, Retry_After="1"), "preupload/main"),
        (fail(500), "whoami"),
        (hang_up, "commit/main"),
    ],
)
def test_a_fault_that_passes_is_waited_for(hub, pruned, fault, where):
    hub.faults = [(where, fault)]
    run(hub, "push", pruned, REPO)
    assert_complete(hub, pruned)
    assert hub.faults == [] and len(hub.repositories[REPO].commits) == 2


def test_a_server_is_waited_for_as_long_as_it_asks_and_no_longer(hub, pruned, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    hub.faults = [("refs", fail(429, Retry_After="7")), ("create", fail(503))]
    run(hub, "push", pruned, REPO)
    assert sorted(waited) == [1, 7]
    assert_complete(hub, pruned)
    hub.faults = [("whoami", fail(429, Retry_After="3600"))]
    done = run(hub, "push", pruned, REPO, code=2)
    assert "run the same command again" in done.stderr and sorted(waited) == [1, 7]


def test_a_page_of_a_gateway_in_the_hubs_place_is_waited_for(hub, pruned):
    def page(handler):
        handler.body()
        handler.answer(200, b"<html>busy</html>")

    hub.faults = [("whoami", page)]
    run(hub, "push", pruned, REPO)
    assert_complete(hub, pruned)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, pruned):
    def answered_to_nobody(handler):
        handler.answer = lambda *_: (setattr(handler, "close_connection", True), handler.connection.close())
        handler.commit(REPO, "main")

    hub.faults = [("commit/main", answered_to_nobody)]
    run(hub, "push", pruned, REPO)
    assert_complete(hub, pruned)
    assert len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize("where", ["PUT /lfs/", "commit/main", "preupload/main"])
def test_a_network_that_stays_away_is_one_error_and_the_next_run_goes_on(hub, pruned, where, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults = [(where, hang_up)] * 400
    done = run(hub, "push", pruned, REPO, code=2)
    assert "run the same command again" in done.stderr.strip().splitlines()[-1]
    assert hub.content(REPO) == {}  # nothing appears in part
    sent, hub.faults = {*hub.large}, []
    hub.requests.clear()
    run(hub, "push", pruned, REPO)
    assert_complete(hub, pruned)
    assert (
        not [oid for oid in sent if hub.count(f"PUT /lfs/{oid}")] and len(hub.repositories[REPO].commits) == 2
    )


def test_pushing_the_same_again_sends_and_commits_nothing(hub, pruned):
    run(hub, "push", pruned, REPO)
    sent = large_uploads(hub)
    run(hub, "push", pruned, REPO)
    assert large_uploads(hub) == sent and len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        (None, REPO, "no hub token"),
        ("hf_wrong", REPO, "does not accept this token"),
        ("hf_reads", REPO, "can only read"),
        ("hf_writes", "stranger/model", "may not write to stranger/model"),
        ("hf_writes", "no id at all", "no hub id"),
    ],
)
def test_what_the_hub_would_refuse_is_one_line(hub, pruned, tmp_path, token, repo, says):
    done = run(hub, "push", pruned, repo, token=token, code=2)
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert large_uploads(hub) == 0


def test_a_repository_with_another_model_is_kept_unless_asked(hub, pruned, tmp_path):
    dense = save_tiny("llama", tmp_path / "other", seed=1)
    prune(dense, tmp_path / "out", pattern="50%", solver="magnitude")
    run(hub, "push", tmp_path / "out", REPO)
    before = hub.content(REPO)
    done = run(hub, "push", pruned, REPO, code=2)
    assert "exists and holds something else" in done.stderr and hub.content(REPO) == before
    run(hub, "push", pruned, REPO, "--overwrite")
    assert_complete(hub, pruned)


def test_a_card_that_the_hub_refuses_stops_it_before_anything_is_sent(hub, pruned):
    hub.refused_cards = '"license" must be one of [apache-2.0, mit]'
    done = run(hub, "push", pruned, REPO, code=2)
    assert "must be one of" in done.stderr and large_uploads(hub) == 0


def test_an_edited_card_is_used_as_it_is(hub, pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "copy")
    card = run(hub, "card", folder, token=None).stdout
    (folder / "README.md").write_text(card.replace("## Known losses", "## What I know of losses"))
    run(hub, "push", folder, REPO)
    text = hub.content(REPO)["README.md"].decode()
    assert "## What I know of losses" in text and "2:4" in ModelCard(text).data.tags


def test_results_of_evaluations_are_where_the_hub_looks_for_them(hub, pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "copy")
    (folder / "eval.json").write_text(json.dumps(full_evaluation()))
    run(hub, "push", folder, REPO)
    there = hub.content(REPO)
    listed = parse_eval_result_entries(yaml.safe_load(there[".eval_results/llmsparse.yaml"]))
    assert {entry.dataset_id for entry in listed} >= {"Salesforce/wikitext", "Rowan/hellaswag"}
    assert ModelCard(there["README.md"].decode()).data.eval_results


def test_prune_takes_a_model_of_the_hub_and_pushes_what_it_wrote(hub, tmp_path):
    dense = save_tiny("llama", tmp_path / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\n---\n# Dense\n")
    commit = hub.add("owner/dense", dense)
    out = tmp_path / "out"
    words = ("prune", "owner/dense", out, "--solver", "magnitude", "--pattern", "2:4", "--push", REPO)
    run(hub, *words, token="hf_reads", code=2)
    assert not out.exists()  # refused before the work
    run(hub, *words)
    assert_complete(hub, out)
    data = ModelCard(hub.content(REPO)["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.license) == ("owner/dense", "finetune", "mit")
    assert json.loads(hub.content(REPO)["report.json"])["commit"] == commit


def test_prune_refuses_a_taken_name_before_the_work_and_a_push_that_fails_after_it_is_told(
    hub, pruned, tmp_path
):
    run(hub, "push", pruned, REPO)
    dense, out = save_tiny("llama", tmp_path / "dense"), tmp_path / "out"
    words = ("prune", dense, out, "--solver", "magnitude", "--push")
    assert "exists and holds a model" in run(hub, *words, REPO, code=2).stderr and not out.exists()
    hub.refused_cards = "no"
    done = run(hub, *words, "someone/other", code=2)
    assert f"{out} is written, but not pushed" in done.stderr and (out / "report.json").is_file()
    hub.refused_cards = None
    run(hub, "push", out, "someone/other")
    assert_complete(hub, out, "someone/other")
