"""export.json: what an export and its check found, beside the files that it wrote."""

import json
from pathlib import Path
from typing import Any

from llmsparse.atomic import write_whole
from llmsparse.report import finite

NAME = "export.json"


def write(folder: Path, result: dict[str, Any]) -> None:
    text = json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / NAME, text + "\n")
