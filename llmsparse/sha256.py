"""The hash by which files are recognised."""

import hashlib
from pathlib import Path


def file_sha256(file: Path) -> str:
    """Of the whole content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
