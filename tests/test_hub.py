"""Hub ids: what is asked of the hub, and what a refusal says."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.plan import plan
from llmsparse.prune import prune
from tests.tiny import save_tiny


class Hub:
    """Stands in for the hub: one model in a local folder, and a list of what was asked for."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.asked = folder, []
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: self)

    def snapshot_download(self, model, allow_patterns, **where):
        self.asked.append((model, tuple(allow_patterns), where))
        return str(self.folder)

    def list_repo_files(self, model, revision=None):
        return [
            *(f.name for f in self.folder.iterdir()),
            "original/consolidated.safetensors",
            "extra.safetensors",
        ]

    def get_safetensors_metadata(self, model, revision=None):
        headers = Checkpoint(self.folder).headers
        files = {
            file: SimpleNamespace(tensors={n: SimpleNamespace(**header) for n, header in tensors.items()})
            for file, tensors in headers.items()
        }
        return SimpleNamespace(files_metadata=files)


def test_plan_of_a_hub_model_downloads_no_weights(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "m")
    local = plan(folder, samples=2, sequence_length=16)
    hub = Hub(folder, monkeypatch)
    planned = plan("owner/name", samples=2, sequence_length=16, revision="v1", cache_dir="c")
    assert planned["weights"] == local["weights"] and planned["coverage"] == local["coverage"]
    assert planned["read_bytes"] == local["read_bytes"]
    assert [model for model, _, _ in hub.asked] == ["owner/name"]
    assert not any("safetensors" in p or "bin" in p for _, patterns, _ in hub.asked for p in patterns)
    assert hub.asked[0][2] == {"revision": "v1", "token": None, "cache_dir": "c"}


def test_prune_of_a_hub_model_asks_for_the_models_own_weights_only(tmp_path, monkeypatch):
    hub = Hub(save_tiny("llama", tmp_path / "m"), monkeypatch)
    prune("owner/name", tmp_path / "out", solver="magnitude")
    wanted = {p for _, patterns, _ in hub.asked for p in patterns if "safetensors" in p}
    assert wanted == {"model.safetensors"}
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a/b/c", "not a folder with a checkpoint; give a hub id"),
        ("bad name!", "neither a folder nor a hub id"),
        ("owner/absent", "could not be had from the hub: .*check its name, the connection and --token"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_error(model, message):
    with pytest.raises(UserError, match=message):
        Checkpoint.open(model)
