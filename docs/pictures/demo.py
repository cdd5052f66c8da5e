"""Draws what `make demo` prints, from a real run, as docs/pictures/demo.svg: `python -m docs.pictures.demo` (minutes)."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console, RenderableType

from llmsparse.demo import demo, show
from llmsparse.progress import progress_for

PICTURE = Path(__file__).with_suffix(".svg")
WIDTH = 100  # characters


def drawn(shown: RenderableType) -> str:
    """A terminal with ``shown`` in it as SVG, which asks nothing of another host: rich's own asks for its font."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print("[bold]$[/] make demo")
    console.print(shown)
    svg = console.export_svg(title="llmsparse", unique_id="demo")
    return re.sub(r"\s*@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    progress = progress_for(sys.stderr, False)
    with progress:
        result = demo(progress=progress)
    PICTURE.write_text(drawn(show(result)), "utf-8")
