"""Bring files to the hub: large ones first, one by one, then a single commit that makes them appear together."""

import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llmsparse.errors import UserError, first_line

TRIES = 5
PATIENCE = 300  # seconds that a server may ask for; longer is told to the user
MEGABYTE = 1 << 20
LOG = logging.getLogger("llmsparse")
Found = TypeVar("Found")


class Remote(NamedTuple):
    """A repository, its revision, and a client with a token for it."""

    api: Any
    repo: str
    revision: str

    @classmethod
    def of(cls, repo: str, revision: str | None, token: str | None) -> "Remote":
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set, and a push needs the hub; unset it")
        return cls(HfApi(token=token), repo, revision or constants.DEFAULT_REVISION)

    def may_write(self) -> None:
        """Ask whose the token is, and what it may do.

        Raises:
            UserError: there is no token, it is wrong, or it may only read.
        """
        from huggingface_hub import get_token

        if not (self.api.token or get_token()):
            raise UserError(
                "no hub token is here; `hf auth login`, or give one with --token (it must be able to write)"
            )
        with _errors(self.repo):
            who = patiently(lambda: self.api.whoami())
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise UserError(
                f"the token of {who.get('name')} can only read; make one that can write at "
                f"{self.api.endpoint}/settings/tokens, and give it with --token"
            )

    def validate(self, card: str) -> None:
        """Have the hub judge the header of a card before anything is sent.

        Raises:
            UserError: it refuses; what it says is in the message.
        """
        from huggingface_hub import ModelCard

        try:
            with _errors(self.repo):
                patiently(lambda: ModelCard(card, ignore_metadata_errors=True).validate(repo_type="model"))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"the hub refuses the card: {' '.join(str(error).split())}; edit it") from error

    def open(self, private: bool) -> dict[str, str | None]:
        """Make the repository and the revision where they are not; what lies there, as ``files`` says."""
        with _errors(self.repo):
            patiently(lambda: self.api.create_repo(self.repo, private=private, exist_ok=True))
            if not self._has_revision():
                patiently(lambda: self.api.create_branch(self.repo, branch=self.revision, exist_ok=True))
            return self.files()

    def has_a_model(self) -> bool:
        """Whether the repository is there and holds large files."""
        with _errors(self.repo):
            return patiently(lambda: self.api.repo_exists(self.repo)) and any(self.files().values())

    def files(self) -> dict[str, str | None]:
        """Path -> sha256 of a large file, None of another; without git's own attributes."""
        tree = patiently(
            lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision))
        )
        files = [entry for entry in tree if hasattr(entry, "blob_id") and entry.path != ".gitattributes"]
        return {file.path: file.lfs.sha256 if file.lfs else None for file in files}

    def begun(self) -> bool:
        """Whether the revision is a branch of its own that has nothing of its own yet."""
        if self.revision == "main":
            return False
        with _errors(self.repo):
            heads = {
                ref.name: ref.target_commit
                for ref in patiently(lambda: self.api.list_repo_refs(self.repo)).branches
            }
        return heads.get(self.revision) == heads.get("main")

    def _has_revision(self) -> bool:
        refs = patiently(lambda: self.api.list_repo_refs(self.repo))
        return self.revision in {ref.name for ref in [*refs.branches, *refs.tags]}

    def send(self, files: dict[str, Path | bytes], gone: list[str], message: str, progress: Any) -> Any:
        """Upload ``files`` and commit them, and the removal of ``gone``; what the server has is not sent again."""
        added = _additions(files, progress)
        where = {"repo_id": self.repo, "revision": self.revision, "num_threads": 1}
        progress.start("uploading, MiB", sum(-(-each.upload_info.size // MEGABYTE) for each in added))
        for operation in added:
            with _counted(operation, progress) as counted, _errors(self.repo):
                patiently(partial(self.api.preupload_lfs_files, additions=[counted], **where))
        first = iter([[*added, *map(_removal, gone)]])

        def commit() -> Any:  # a commit whose answer was lost is there: then nothing has changed any more
            operations = next(first, None) or self._still_to_do(files, gone, progress)
            return self.api.create_commit(operations=operations, commit_message=message, **where)

        with _errors(self.repo):
            return patiently(commit)

    def _still_to_do(self, files: dict[str, Path | bytes], gone: list[str], progress: Any) -> list[Any]:
        there = self.files()
        return [*_additions(files, progress), *(_removal(path) for path in gone if path in there)]


def _additions(files: dict[str, Path | bytes], progress: Any) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    progress.start("hashing", len(files))
    added = []
    for path, content in files.items():
        added.append(CommitOperationAdd(path, content if isinstance(content, bytes) else str(content)))
        progress.advance("hashing", path)
    return added


def _removal(path: str) -> Any:
    from huggingface_hub import CommitOperationDelete

    return CommitOperationDelete(path)


class _Counting(io.BufferedReader):
    """A file that tells how far it was ever read."""

    def __init__(self, file: Path, tell: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(file))
        self._tell = tell

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._tell(self.tell())
        return data


@contextmanager
def _counted(operation: Any, progress: Any) -> Iterator[Any]:
    """The operation, reading through a counter where its content is a file; a bar's step for each MiB."""
    total, done = -(-operation.upload_info.size // MEGABYTE), 0

    def tell(position: int) -> None:
        nonlocal done
        while done < min(position // MEGABYTE, total):
            done += 1
            progress.advance("uploading, MiB", operation.path_in_repo)

    from huggingface_hub import constants

    source = operation.path_or_fileobj
    xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    if xet or not isinstance(source, str):  # Xet reads an open file into memory, a named one piece by piece
        yield operation
    else:
        with _Counting(Path(source), tell) as operation.path_or_fileobj:
            yield operation
        operation.path_or_fileobj = source
    tell(total * MEGABYTE)


def patiently(call: Callable[[], Found]) -> Found:
    """``call()``, again where the network or the server fails for a moment: 1, 2, 4, 8 s, or what the server asks."""
    for tried in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            wait = _wait(_cause(error), tried)
            if wait is None or tried == TRIES:
                raise
            LOG.warning("%s; again in %.0f s (%d of %d)", first_line(_cause(error)), wait, tried, TRIES - 1)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException:
    """What a large file's upload failed of: huggingface_hub wraps it."""
    return _cause(error.__cause__) if isinstance(error, RuntimeError) and error.__cause__ else error


def _wait(error: BaseException, tried: int) -> float | None:
    """Seconds after which another try makes sense; None where it never does."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None:
        return float(2 ** (tried - 1)) if _network(error) else None
    if status != 429 and status < 500:
        return None
    asked = str(response.headers.get("Retry-After", ""))  # type: ignore[union-attr]
    seconds = float(asked) if asked.isdigit() else float(2 ** (tried - 1))
    return seconds if seconds <= PATIENCE else None


def _network(error: BaseException) -> bool:
    """Whether the connection failed, or a gateway answered in the hub's place with a page that is no JSON.

    The client's library has errors of its own for that, of no fixed module.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError", "JSONDecodeError"})


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    """One clear error for what the hub or the network refuses; a fault of the program stays one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (told := _told(_cause(error), repo)) is None:
            raise
        raise UserError(told) from error


def _told(error: BaseException, repo: str) -> str | None:
    from huggingface_hub import errors

    said, again = first_line(error), "run the same command again: what has arrived is not sent twice"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no hub id; it is owner/name: {said}"
    if status == 401 and not isinstance(error, errors.GatedRepoError):
        return f"the hub does not accept this token ({said}); `hf auth login`, or give another with --token"
    if status == 403:
        return f"this token may not write to {repo} ({said}); check the owner, or give a token that can write"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is not there, or this token may not see it ({said}); check its name"
    if isinstance(error, errors.BadRequestError):
        return f"the hub refuses the upload to {repo}: {' '.join(str(error).split())}"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub failed while {repo} was pushed ({said}); {again}"
    return (
        f"the connection to the hub was lost while {repo} was pushed ({said}); {again}"
        if _network(error)
        else None
    )
