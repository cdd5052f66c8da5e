"""Text files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmsparse.errors import UserError


def check_place(file: str | Path | None) -> None:
    """Refuse a place where no file can be written, before the work whose result it would hold."""
    if file is None:
        return
    path = Path(file).expanduser()
    if path.is_dir():
        raise UserError(f"{file} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{file} would lie in {path.parent}, which is no folder; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{file} would lie in {path.parent}, where you may not write; choose another place")


def write_whole(file: str | Path, text: str) -> None:
    """``file`` appears whole or stays as it was."""
    path = Path(file).expanduser()
    with tempfile.NamedTemporaryFile(
        "w", dir=path.absolute().parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as new:
        try:
            new.write(text)
            new.flush()
            os.chmod(new.name, 0o644)
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` to be filled; it takes the place of ``out`` at the end, or vanishes on an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".llmsparse-new", dir=out.parent))
    old = work.with_suffix(".llmsparse-old")
    try:
        yield work
        work.chmod(0o755)  # mkdtemp made it private
        if out.exists():
            out.rename(old)
        work.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
