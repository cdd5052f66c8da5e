"""Checkpoints on the hub: all of their files, or all but the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmsparse.errors import UserError, first_line

OTHERS = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "README.md",
    "LICEN*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


class Source:
    """One revision of a hub model, and how it is reached.

    Raises:
        UserError: from each method, when the id is none, or the hub cannot be reached or refuses.
    """

    def __init__(self, model: str, revision: str | None, token: str | None, cache_dir: str | None) -> None:
        self.model, self.revision, self.token = model, revision, token
        self.where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}

    def download(self) -> Path:
        """Every file of the checkpoint; ``.bin`` weights only where there are no safetensors."""
        from huggingface_hub import snapshot_download

        with self._errors():
            folder = Path(snapshot_download(self.model, allow_patterns=list(OTHERS), **self.where))
            names = self._names()
            safe = [name for name in names if name.endswith(".safetensors") and "/" not in name]
            weights = [n for n in safe if n.startswith("model")] or safe or ["pytorch_model*.bin"]
            snapshot_download(self.model, allow_patterns=[*OTHERS, *weights], **self.where)
            return folder

    def headers(self) -> tuple[Path, dict[str, dict[str, Any]]] | None:
        """The other files, and file -> tensor -> dtype and shape from the hub; None without safetensors."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import NotASafetensorsRepoError

        with self._errors():
            folder = Path(snapshot_download(self.model, allow_patterns=list(OTHERS), **self.where))
            try:
                found = HfApi(token=self.token).get_safetensors_metadata(self.model, revision=self.revision)
            except NotASafetensorsRepoError:
                return None
        return folder, {
            file: {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in metadata.tensors.items()}
            for file, metadata in found.files_metadata.items()
        }

    def _names(self) -> list[str]:
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            return []  # what the cache holds is all there is: any pattern will do
        return HfApi(token=self.token).list_repo_files(self.model, revision=self.revision)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            yield
        except HFValidationError as error:
            raise UserError(f"{self.model!r} is neither a folder nor a hub id (owner/name)") from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"{self.model} is not a local folder and could not be had from the hub: {first_line(error)}; "
                "check its name, the connection and --token"
            ) from error
