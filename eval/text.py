"""The texts that a model is evaluated on."""

import hashlib
import os
import platform
from pathlib import Path
from typing import NamedTuple

from llmsparse.documents import FORMS, builtin_documents, documents
from llmsparse.errors import UserError

WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1:test"


class Source(NamedTuple):
    """A text to score."""

    name: str  # as it was asked for
    text: str
    sha256: str
    label: str


def load_sources(data: str | None, token: str | None = None, cache_dir: str | None = None) -> list[Source]:
    """The texts that ``data`` names, separated by commas; none for None. UserError as ``load_text``."""
    if data is None:
        return []
    names = [data] if Path(data).expanduser().exists() else data.split(",")
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise UserError(f"--data {data!r} names no text; give wikitext2, builtin, a file or a hub dataset")
    return [Source(name, *load_text(name, token, cache_dir)) for name in names]


def load_text(data: str, token: str | None = None, cache_dir: str | None = None) -> tuple[str, str, str]:
    """The text named ``data``, the sha256 of its UTF-8 bytes, and a label that says what it is.

    ``wikitext2`` is the test split's rows joined by blank lines, as GPTQ, SparseGPT and Wanda score it
    (from the folder that LLMSPARSE_DATA names, else the hub); ``builtin`` the held-out fifth of pydoc's
    topics; a .txt is taken as it is; rows of .jsonl, .parquet and hub datasets are joined by blank lines.

    Raises:
        UserError: the text is unknown, unreachable, empty, or a list of conversations.
    """
    if data == "wikitext2":
        text, label = _wikitext2(token, cache_dir), "WikiText-2 (raw, test): rows joined by blank lines"
    elif data == "builtin":
        text = "\n\n".join(builtin_documents(held_out=True))
        label = f"builtin: the held-out fifth of pydoc's topics, Python {platform.python_version()}"
    else:
        path = Path(data).expanduser()
        text = _joined(data, token, cache_dir)
        as_it_is = path.is_file() and path.suffix == ".txt"
        label = f"{data}: {'as it is' if as_it_is else 'documents joined by blank lines'}"
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold halves of characters
    if not text.strip():
        raise UserError(f"{data} holds no text to evaluate on")
    return text, hashlib.sha256(text.encode()).hexdigest(), label


def _wikitext2(token: str | None, cache_dir: str | None) -> str:
    folder = os.environ.get("LLMSPARSE_DATA")
    if not folder:
        return _joined(WIKITEXT2, token, cache_dir)
    file = Path(folder, "text", "wikitext2", "test.txt")
    if not file.is_file():
        raise UserError(
            f"LLMSPARSE_DATA={folder} has no text/wikitext2/test.txt; put it there or unset the variable"
        )
    with file.open(encoding="utf-8", newline="") as lines:
        # The hub's rows are the file's lines, the blank ones empty.
        rows = ["" if not line.strip() else line for line in lines.read().splitlines(keepends=True)]
    return "\n\n".join(rows)


def _joined(data: str, token: str | None, cache_dir: str | None) -> str:
    try:
        found = list(documents(data, token=token, cache_dir=cache_dir))
    except UserError as error:
        raise UserError(
            str(error).replace(FORMS, f"wikitext2, {FORMS.partition(', or several')[0]}")
        ) from error
    texts = [document for document in found if isinstance(document, str)]
    if len(texts) < len(found):
        raise UserError(f"{data} holds conversations (messages); evaluation scores texts: give a field text")
    return "\n\n".join(texts)
