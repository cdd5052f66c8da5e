"""What the command line says of each option; a recipe's options say it themselves."""

from dataclasses import fields

from llmsparse.recipe import Recipe
from llmsparse.recovery import Recovery

METAVARS = {
    "set": "KEY=VALUE",
    "skip": "REGEX",
    "include": "REGEX",
    "recipe": "FILE",
    "keep": "FOLDER",
    "against": "MODEL",
    "data": "TEXTS",
    "tasks": "TASKS",
    "task_data": "FOLDER",
    "html": "FILE",
    "markdown": "FILE",
    "generate": "N",
    "limit": "N",
    "prompt": "TEXT",
    "push": "REPO_ID",
    "repo": "REPO_ID",
    "base_model": "REPO_ID",
    "stride": "N",
    "teacher": "MODEL",
}
HELP = {
    "model": "a hub id (owner/name) or a local folder",
    "sparse": "a folder that prune wrote, or a pruned model's hub id",
    "out": "the folder to write; it appears whole or not at all",
    "recipe": "YAML file of these options; options given here win",
    "resume": "continue a run that was cut off",
    "overwrite": "replace OUT if it exists",
    "data": "texts, separated by commas: wikitext2, builtin, files, hub datasets id[:config][:split]",
    "tasks": "zero-shot tasks, separated by commas: NAME.jsonl of --task-data, or lm-evaluation-harness's own",
    "limit": "score only the first so many items of each task",
    "task_data": "a folder of NAME.jsonl tasks (default: the folder zeroshot of $LLMSPARSE_DATA)",
    "stride": "tokens from one window to the next (default: no overlap)",
    "generate": "how many beginnings of the first text to continue, to be looked at",
    "runs": "pruned folders, or files that eval --out wrote; NAME=RUN names one",
    "html": "write a page there, self-contained",
    "markdown": "write the tables there as markdown",
    "context": "tokens a window",
    "windows": "score only the first so many windows",
    "against": "a dense model to compare with: fidelity, flips, the ability kept",
    "format": "one of `llmsparse list exporters`",
    "prompt": "the text to continue",
    "max_new_tokens": "stop after so many tokens",
    "temperature": "0 takes the likeliest token, larger values draw more freely",
    "chat": "put the prompt into the model's chat template, as a user's message",
    "keep": "where the pruned checkpoints stay (default: they are removed)",
    "folder": "a folder that prune, quantize or export wrote",
    "repo_id": "the repository, owner/name; made where it is not",
    "repo": "the id that the folder will have (default: OWNER/ and its name)",
    "private": "make the repository for yourself alone",
    "base_model": "the dense model's hub id (default: the one that was downloaded)",
    "dry_run": "say what would be sent, and reach no network",
    "push": "publish OUT there afterwards, see `llmsparse push`",
    "action": "show",
    "source": "a recipe file, or a folder that prune wrote",
    "kind": "solvers, patterns... (default: everything)",
    "json": "print one JSON document on standard output and nothing else there",
}
HELP = {field.name: field.metadata["help"] for field in fields(Recipe)} | HELP
HELP_OF = {  # where a name means less than it does to prune
    ("eval", "batch_size"): "windows a forward pass, or so many times 512 tokens of task items",
    ("eval", "out"): "write the results there as JSON too; compare and report read them",
    ("bench", "pattern"): "prune each weight to it by magnitude first (default: the model's own zeros)",
    ("bench", "values"): "kinds of values, separated by commas",
    ("bench", "threads"): "thread counts, separated by commas",
    ("bench", "tokens"): "tokens a product, 1 to 8",
    ("bench", "calls"): "timed products of each shape, at least",
    (
        "export",
        "values",
    ): "bf16, fp16, fp32, int8, int4:32; gguf also q8_0, q4_0, q4_k, q6_k (default: the codes beside MODEL, else bit for "
    "bit; gguf, openvino: fp16; onnx, executorch: fp32; c-header: int8)",
    (
        "export-matrix",
        "out",
    ): "a folder for all of them (default: NAME-exports here); what lies there already is kept",
    ("export-matrix", "formats"): "formats, separated by commas (default: all)",
    (
        "export-matrix",
        "values",
    ): "kinds of values, separated by commas (default: the codes beside MODEL, else int8,int4:32)",
    (
        "export-matrix",
        "embeddings",
    ): "keep, int8, int4:32 (default: as the codes, else int8 with integer values)",
    ("export-matrix", "overwrite"): "write again what lies in OUT",
    ("export", "check"): "measure what was written, in its own runtime too; fail where it differs too much",
    ("export", "embeddings"): "keep, int8, int4:32 (default: as the codes, else int8 with integer values)",
    ("push", "revision"): "the branch to commit to, made where it is not (default: main)",
    ("push", "overwrite"): "replace what another model has there",
    ("generate", "seed"): "draws the same tokens again",
    ("demo", "samples"): "calibration windows",
    ("demo", "sequence_length"): "tokens a window",
    ("demo", "windows"): "windows that are scored",
}
HELP_OF |= {("recover", field.name): field.metadata["help"] for field in fields(Recovery)}
