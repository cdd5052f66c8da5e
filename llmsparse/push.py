"""Publish a folder that llmsparse wrote on the hub, with a card."""

from pathlib import Path
from typing import Any

from llmsparse.card import run_of, text_of
from llmsparse.card_metadata import HUB_ID, entries
from llmsparse.errors import UserError
from llmsparse.progress import Quiet
from llmsparse.publication import CARD, Publication, collect
from llmsparse.sha256 import file_sha256
from llmsparse.upload import Remote

RESULTS = ".eval_results/llmsparse.yaml"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Upload ``folder``, which prune, quantize or export wrote, to the hub repository ``repo_id``, in one commit.

    Local paths and user names are taken out of its reports, hidden files stay here, README.md becomes the card (one
    that ``llmsparse card`` wrote and somebody edited is used as it is). An interrupted push goes on when it is run
    again. ``private``: of a repository that is made now. ``revision``: a branch, made where it is not. ``overwrite``:
    replace what another model has there. ``dry_run``: say what would be sent, and reach no network.
    Returns ``repo``, ``url``, ``commit`` (None in a dry run), ``files`` (path and bytes), ``bytes``, ``warnings``.

    Raises:
        UserError: a folder that must not be published (see ``collect``), an id that is none, a token that is absent,
            wrong or read-only, a repository that holds something else, a card or an upload that the hub refuses, a
            network that fails longer than some tries take.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no hub id; it is owner/name")
    progress = progress or Quiet()
    found = collect(folder)
    text, warnings = text_of(found, repo_id, base_model)
    files: dict[str, Path | bytes] = {**found.files, CARD: text.encode(), **_results(found)}
    told = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in files.items()}
    result: dict[str, Any] = {
        "repo": repo_id,
        "revision": revision,
        "private": private,
        "files": [{"path": name, "bytes": size} for name, size in told.items()],
        "bytes": sum(told.values()),
        "url": None,
        "commit": None,
        "warnings": warnings,
    }
    if dry_run:
        return result
    return result | _send(found, files, Remote.of(repo_id, revision, token), private, overwrite, progress)


def may_push(repo_id: str, token: str | None) -> None:
    """Refuse what a push would be refused for, before the work whose result it would publish.

    Raises:
        UserError: no id, a token that is absent, wrong or read-only, a repository that holds a model.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no hub id; it is owner/name")
    remote = Remote.of(repo_id, None, token)
    remote.may_write()
    if remote.has_a_model():
        raise UserError(
            f"{repo_id} exists and holds a model; choose another name, or leave --push out and replace it afterwards "
            f"with `llmsparse push OUT {repo_id} --overwrite`"
        )


def _results(found: Publication) -> dict[str, bytes]:
    """The hub's file of evaluation results, where there are any that it can place."""
    import yaml

    listed = entries(run_of(found))
    return {RESULTS: yaml.safe_dump(listed, sort_keys=False).encode()} if listed else {}


def _send(
    found: Publication,
    files: dict[str, Path | bytes],
    remote: Remote,
    private: bool,
    overwrite: bool,
    progress: Any,
) -> dict[str, Any]:
    """Ask the hub everything that it could refuse, then send."""
    remote.may_write()
    remote.validate(_text(files[CARD]))
    there = remote.open(private)
    replaces = overwrite or remote.begun()
    if not replaces and not _same(there, files):
        names = sorted(there)
        raise UserError(
            f"{remote.repo} exists and holds something else ({', '.join(names[:3])}{', ...' * (len(names) > 3)}); "
            "choose another name or --revision, or replace it with --overwrite"
        )
    gone = sorted(set(there) - set(files)) if replaces else []
    commit = remote.send(files, gone, f"{found.folder.resolve().name}, written by llmsparse", progress)
    return {"url": f"{remote.api.endpoint}/{remote.repo}", "commit": commit.oid}


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()


def _same(there: dict[str, str | None], files: dict[str, Path | bytes]) -> bool:
    """Whether a repository has nothing yet but a card, or the weights that are to be pushed."""
    large = {path: sha for path, sha in there.items() if sha is not None}
    if not large:
        return set(there) <= {CARD}
    return all(
        isinstance(f := files.get(path), Path) and file_sha256(f) == sha for path, sha in large.items()
    )
