"""The command line: each command is a shell over a public function, its options taken from the signature."""

import ast
import contextlib
import errno
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, get_args, get_origin

import typer
from typer.core import TyperCommand

from llmsparse import plugins
from llmsparse.errors import UserError
from llmsparse.option_help import HELP, HELP_OF, METAVARS
from llmsparse.progress import progress_for
from llmsparse.signatures import signature_of


class Shell(NamedTuple):
    """A command: the module and the name of its function, and a line of help."""

    module: str
    function: str
    help: str

    def load(self) -> Callable[..., dict[str, Any]]:
        return getattr(importlib.import_module(self.module), self.function)


SHELLS = {
    "prune": Shell("llmsparse.prune", "prune", "Prune MODEL, a hub id or a folder, into the new folder OUT."),
    "recover": Shell(
        "llmsparse.recover",
        "recover",
        "Train SPARSE, zeros held, on its dense parent's outputs.",
    ),
    "quantize": Shell(
        "llmsparse.quantize", "quantize", "Round MODEL's weights to int8 or int4, calibrated, into OUT."
    ),
    "plan": Shell("llmsparse.plan", "plan", "What prune would do and cost, without loading a weight."),
    "eval": Shell(
        "llmsparse.eval.evaluate", "evaluate", "What MODEL is worth, alone or beside its dense parent."
    ),
    "export": Shell(
        "llmsparse.export",
        "export",
        "Write MODEL into OUT for a runtime: packed, GGUF, ONNX...",
    ),
    "export-matrix": Shell(
        "llmsparse.export_matrix",
        "export_matrix",
        "Export MODEL to every format; check each, draw all.",
    ),
    "generate": Shell(
        "llmsparse.generate", "generate", "Continue a prompt with MODEL: dense, pruned or packed."
    ),
    "push": Shell("llmsparse.push", "push", "Publish FOLDER on the hub as REPO_ID, with a model card."),
    "card": Shell("llmsparse.card", "card", "The model card of FOLDER, to be edited before a push."),
    "compare": Shell(
        "llmsparse.compare", "compare", "One table of several runs, and what must not be compared."
    ),
    "report": Shell("llmsparse.page", "report", "One page (HTML, markdown) that shows one run or several."),
    "inspect": Shell(
        "llmsparse.inspect", "inspect", "The zeros of MODEL: sparsity and n:m pattern of each weight."
    ),
    "recipe": Shell(
        "llmsparse.recipe", "recipe", "`recipe show FILE`: every option of a recipe, or of a run."
    ),
    "bench": Shell("llmsparse.bench", "bench", "Time MODEL's linear layers here: packed, dense in C, torch."),
    "doctor": Shell("llmsparse.doctor", "doctor", "What this machine has: native kernels, GPU, versions."),
    "list": Shell("llmsparse.cli", "choices", "What there is to choose from: solvers, patterns..."),
    "demo": Shell("llmsparse.demo", "demo", "Prune a small model each way; perplexity before, after."),
}
PYTHON_ONLY = {"progress", "write"}  # parameters that are no options
EXAMPLES = ("50%", "1:4", "2:4", "3:4", "4:8", "8:16")


def choices(kind: str | None = None) -> dict[str, Any]:
    """What there is to choose from: ``{kind: [{"name", "about"}]}``; of one kind, or of all.

    A plug-in's line is the first of its file, read without importing it; ``options`` are those of ``--set``.
    Raises UserError on an unknown kind.
    """
    known = ["patterns", *plugins.kinds()]
    if kind is not None and kind not in known:
        raise UserError(f"kind {kind!r} is unknown; known: {', '.join(known)}")
    return {k: _patterns() if k == "patterns" else _plugins(k) for k in known if kind in (None, k)}


def _plugins(kind: str) -> list[dict[str, str]]:
    found = []
    for name in plugins.names(kind):
        tree = ast.parse(plugins.file(kind, name).read_text("utf-8"))
        about = (ast.get_docstring(tree) or "").partition("\n")[0]
        found.append({"name": name, "about": about, "options": " ".join(_options(tree))})
    return found


def _options(tree: ast.Module) -> Iterator[str]:
    """``name=default`` of each field of the file's dataclass, ``inner=...`` where it holds another solver."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    plugin = next((c for c in classes if "dataclass" in "".join(map(ast.unparse, c.decorator_list))), None)
    for node in plugin.body if plugin else ():
        if (
            isinstance(node, ast.AnnAssign)
            and node.value is not None
            and "ClassVar" not in ast.unparse(node.annotation)
        ):
            default = ast.unparse(node.value)
            held = re.search(r"default_factory=(\w+)", default)
            yield f"{ast.unparse(node.target)}={held[1].lower() if held else default}"


def _patterns() -> list[dict[str, str]]:
    from llmsparse.pattern import describe, parse_mask

    described = {text: describe(parse_mask(text)).partition(" (")[2].rstrip(")") for text in EXAMPLES}
    other = {
        "n:m": "any other: n kept of m consecutive inputs",
        "p%": "p percent zero, anywhere (see --scope)",
        "width:p%": "a smaller model: p percent of the MLP channels and key/value heads go",
        "depth:n": "a smaller model: n blocks go",
    }
    return [{"name": name, "about": about} for name, about in (described | other).items()]


class LazyCommand(TyperCommand):
    """A command that imports its function, which may import torch, only when its options are needed."""

    @cached_property
    def _command(self) -> Any:
        alone = typer.Typer(add_completion=False)
        alone.command(self.name)(shell_function(str(self.name)))
        return typer.main.get_command(alone)

    @property
    def params(self) -> list[Any]:
        return self._command.params

    @params.setter
    def params(self, value: list[Any]) -> None:
        """The placeholder's options: none."""

    def invoke(self, ctx: Any) -> Any:
        return self._command.invoke(ctx)


def shell_function(command: str) -> Callable[..., None]:
    """A function for typer whose parameters are those of the command's public function, and ``--json``."""
    taken = signature_of(SHELLS[command].module, SHELLS[command].function).parameters
    parameters = [p for p in taken.values() if p.name not in PYTHON_ONLY]

    def shell(ctx: typer.Context, **values: Any) -> None:
        as_json = values.pop("json")
        given = {k: v for k, v in values.items() if _given(ctx, k)}
        run(command, {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, as_json)

    shown = [_typer_parameter(p, HELP_OF.get((command, p.name), HELP.get(p.name))) for p in parameters]
    shown.append(_option("json", bool, False, HELP["json"]))
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    shell.__signature__ = inspect.Signature([context, *shown])  # type: ignore[attr-defined]
    shell.__annotations__ = {p.name: p.annotation for p in [context, *shown]}
    return shell


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _typer_parameter(parameter: inspect.Parameter, text: str | None) -> inspect.Parameter:
    """Positional and without default, or the model: an argument; else an option."""
    required = parameter.default is inspect.Parameter.empty
    kind, name = _type(parameter.annotation), parameter.name
    if not required and name not in ("model", "kind"):
        return _option(name, kind, parameter.default, text)
    default = typer.Argument(
        ... if required else parameter.default, help=text, show_default=False, metavar=name.upper()
    )
    return _keyword(name, kind if required else kind | None, default)


def _option(name: str, kind: Any, default: Any, text: str | None) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    if get_origin(kind) is list:
        option = typer.Option(list(default), flag, help=text, metavar=METAVARS.get(name))
        return _keyword(name, kind, option)
    option = typer.Option(default, flag, help=text, metavar=METAVARS.get(name))
    return _keyword(name, kind | None if default is None else kind, option)


def _keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _type(annotation: Any) -> Any:
    """What is read for an annotation: ``int | None`` is int, a tuple is a list of text, a path is text."""
    if get_origin(annotation) in (tuple, list):
        return list[str]
    found = [a for a in (annotation, *get_args(annotation)) if a in (bool, int, float)]
    return found[0] if found and str not in get_args(annotation) else str


def run(command: str, given: dict[str, Any], as_json: bool) -> None:
    """Call the command's function with the options given, and show its result; errors become one line."""
    speaks = os.environ.get("RANK", "0") in ("", "0")  # of several processes the first one speaks
    progress = progress_for(sys.stderr, as_json or not speaks)
    function = SHELLS[command].load()
    taken = inspect.signature(function).parameters
    if "progress" in taken:
        given = {**given, "progress": progress}
    if "write" in taken and not as_json:
        given = {**given, "write": _write}
    with _streams(speaks, as_json):
        try:
            with progress:
                result = function(**given)
        except KeyboardInterrupt:
            resumable = "; run the same command with --resume to continue" if "resume" in taken else ""
            _end(f"interrupted{resumable}", 130)
        except Exception as error:
            if (explanation := explain(error, given)) is None:
                raise
            _end(f"error: {explanation}", 2)
    if speaks:
        _print(command, result, as_json)
    if result.get("failed"):
        _end(f"error: {'; '.join(result['failed'])}", 2)


def _write(text: str) -> None:
    """Show text at once, as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def explain(error: Exception, given: dict[str, Any]) -> str | None:
    """One line for an error that is the user's to solve; None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    full = "No space left on device" in text or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full:  # safetensors and torch wrap the system's error in their own
        where = f" while writing {given['out']}" if "out" in given else ""
        return f"disk full{where} ({text}); free some space, then run the same command with --resume"
    if type(error).__name__ == "OutOfMemoryError":
        less = "a smaller --batch-size, --samples or --sequence-length, or --device cpu"
        if "sparse" in given:
            less = "--checkpointing, --optimizer adamw8bit, a smaller --batch-size or --sequence-length, or --device cpu"
        return f"out of memory ({text}); use {less}"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return f"{text}; choose a place that you may read and write"
    return None


def _end(line: str, code: int) -> NoReturn:
    typer.echo(line, err=True)
    raise typer.Exit(code) from None


@contextlib.contextmanager
def _streams(speaks: bool, as_json: bool) -> Iterator[None]:
    """Keep what libraries print off standard output in front of JSON, and a silent process silent."""
    with contextlib.ExitStack() as stack:
        if not speaks:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        elif as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _print(command: str, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from llmsparse.report import finite

        typer.echo(json.dumps(finite(result), indent=2, default=str, allow_nan=False))
        return
    from rich.console import Console

    from llmsparse.render import SHOW

    width = None if sys.stdout.isatty() else 160  # a pipe has no width; rich would take 80
    Console(file=sys.stdout, width=width).print(SHOW[command](result))


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from llmsparse import __version__

        typer.echo(f"llmsparse {__version__}")
        raise typer.Exit


@app.callback(help="Prune a language model with one command.")
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="the version"),
) -> None:
    """Before a command imports anything: the hub's and datasets' bars are quiet where ours is."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _placeholder() -> None:
    """What typer registers; LazyCommand puts the command in its place."""


for _name, _shell in SHELLS.items():
    app.command(_name, cls=LazyCommand, help=_shell.help)(_placeholder)
