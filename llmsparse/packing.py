"""Which weights of a checkpoint can be packed, and the numbers that each is stored as."""

import json
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import rename_source_key
from transformers.pytorch_utils import Conv1D

from llmsparse import bits
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.figures import byte_size
from llmsparse.grid import Grid
from llmsparse.gridfile import NAME, GridFile
from llmsparse.packed_embedding import can_pack
from llmsparse.skeleton import Skeleton, Weight
from llmsparse.values import Values

PARTS = (
    "mask",
    "values",
    "positions",
    "codes",
    "scales",
)  # names that packed tensors have after the module's


@dataclass(frozen=True)
class Candidate:
    """A module whose weight can be packed, and the disk tensors that hold it."""

    path: str
    source: str
    transposed: bool = False
    table: bool = False  # an embedding: rows are looked up in it
    head: bool = False  # the output layer, when it has a matrix of its own
    tied: tuple[str, ...] = ()  # modules that use the same matrix
    copies: tuple[str, ...] = ()  # disk tensors that hold it once more

    @property
    def stem(self) -> str:
        """What the names of its packed tensors begin with."""
        return self.source.removesuffix(".weight")


@dataclass
class Found:
    """What can be packed, in the model's order, and what cannot, in words."""

    packable: list[Candidate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def candidates(skeleton: Skeleton) -> Found:
    """Every plain linear layer, every embedding, and why the others stay as they are."""
    found = Found()
    tables = [skeleton.model.get_submodule(path) for path in skeleton.tables]
    left: dict[str, dict[str, int]] = {}  # reason -> disk tensor -> bytes
    shared = {skeleton.sources[f"{path}.weight"][0][0] for path in skeleton.tables}
    for path, table in zip(skeleton.tables, tables, strict=True):
        if isinstance(table, nn.Embedding):
            found.packable += _table(skeleton, path, table, found.warnings)
    dropped = {name for candidate in found.packable for name in candidate.copies}
    for weight in skeleton.weights:
        if weight.source in dropped or (weight.source in shared and _is_table(skeleton, weight, tables)):
            continue
        if reason := _why_not(skeleton, weight):
            left.setdefault(reason, {})[weight.source] = skeleton.checkpoint.bytes(weight.source)
            continue
        path = weight.parameter.removesuffix(".weight")
        found.packable.append(Candidate(path, weight.source, weight.transposed, head=weight.source in shared))
    for reason, sizes in left.items():
        size = byte_size(sum(sizes.values()))
        found.warnings.append(
            f"{len(sizes)} tensors ({size}) stay dense: {reason}; the first is {next(iter(sizes))}"
        )
    return found


def _is_table(skeleton: Skeleton, weight: Weight, tables: list[nn.Module]) -> bool:
    """Whether the weight is an output layer that shares an embedding's matrix."""
    module = skeleton.model.get_submodule(weight.parameter.removesuffix(".weight"))
    return not any(module is table for table in tables) or _differs(skeleton, weight)


def _differs(skeleton: Skeleton, weight: Weight) -> bool:
    """Whether the model ties it, though the files hold another matrix: left alone, as transformers does."""
    return bool(skeleton.same_as(weight.source))


def _table(skeleton: Skeleton, path: str, module: nn.Embedding, warnings: list[str]) -> Iterator[Candidate]:
    source = skeleton.sources[f"{path}.weight"][0][0]
    pairs = (getattr(skeleton.model, "all_tied_weights_keys", None) or {}).items()
    ends = [end for pair in pairs if f"{path}.weight" in pair for end in pair if end != f"{path}.weight"]
    followers = tuple(dict.fromkeys(end.removesuffix(".weight") for end in ends))
    copies = tuple(skeleton.same_as(source))
    checkpoint = skeleton.checkpoint
    if any(not torch.equal(checkpoint.tensor(source), checkpoint.tensor(copy)) for copy in copies):
        warnings.append(f"{source} stays dense: the model ties it to {copies[0]}, which differs from it")
    elif any(type(skeleton.model.get_submodule(follower)) is not nn.Linear for follower in followers):
        warnings.append(f"{source} stays dense: {followers[0]}, which shares it, is no plain linear layer")
    elif not can_pack(type(module)):
        warnings.append(f"{source} stays dense: {type(module).__name__} looks rows up in its own way")
    elif _names_hold(skeleton, source, path):
        yield Candidate(path, source, table=True, tied=followers, copies=copies)


def _why_not(skeleton: Skeleton, weight: Weight) -> str | None:
    """Why a weight stays dense."""
    parts = skeleton.sources[weight.parameter]
    if weight.index is not None or weight.expert is not None:
        return "experts of a mixture are no linear layers of their own"
    if len(parts) > 1 or parts[0][1] is not None:
        return "the model makes one parameter of several tensors"
    path = weight.parameter.removesuffix(".weight")
    kind = type(skeleton.model.get_submodule(path))
    if kind not in (nn.Linear, Conv1D):
        return f"{kind.__name__} is no plain linear layer"
    stored = skeleton.checkpoint.dtype(weight.source)
    if not stored.is_floating_point or stored.itemsize < 2:
        return f"stored as {str(stored).removeprefix('torch.')}"
    return (
        None if _names_hold(skeleton, weight.source, path) else "transformers would not find its packed names"
    )


def _names_hold(skeleton: Skeleton, source: str, path: str) -> bool:
    """Whether transformers takes the packed names on disk for those of the module."""
    if not source.endswith(".weight"):
        return False
    stem = source.removesuffix(".weight")
    extra = {f"{path}.{part}": torch.empty(0) for part in PARTS}
    wanted: Any = ChainMap(extra, skeleton.model.state_dict(keep_vars=True))
    rules = skeleton._renamings, skeleton._converters, skeleton.model.base_model_prefix
    return all(rename_source_key(f"{stem}.{p}", *rules, wanted)[0] == f"{path}.{p}" for p in PARTS)


class Numbers:
    """The stored numbers of each weight: its bits, or codes from the file beside the model, or fitted ones."""

    def __init__(self, checkpoint: Checkpoint, values: str | None, embeddings: str | None) -> None:
        self.checkpoint = checkpoint
        self.codes = GridFile.open(checkpoint.folder)
        self.values = None if values is None else Values.parse(values)
        fitted = self.values is not None and self.values.float_dtype is None
        default = "int8" if fitted else "keep"
        self.embeddings = embeddings or default
        if self.embeddings != "keep":
            Grid.parse(self.embeddings)
        if fitted:
            Grid.parse(str(values))
        self.asked_embeddings = embeddings
        self._warnings: list[str] = []
        self.negative_zeros = 0  # in what was packed bit for bit so far
        if fitted and self.codes is None:
            self._warnings.append(
                f"{values} values are the nearest to each weight alone; `llmsparse prune --values {values}` or "
                f"`llmsparse quantize --values {values}`, which calibrate, lose less"
            )
        self._patterns = _patterns(checkpoint)

    @property
    def warnings(self) -> list[str]:
        """What the user should know of the numbers, complete once all of them were asked for."""
        if not self.negative_zeros:
            return self._warnings
        return [
            *self._warnings,
            f"{self.negative_zeros:,} weights are -0.0, which is stored as a value, since packing changes no bit; "
            "add 0.0 to the weights to make them +0.0",
        ]

    def describe(self) -> dict[str, Any]:
        """Where the numbers came from."""
        if self.codes is not None:
            kinds = sorted({str(self.codes.grid(name)) for name in self.codes.names})
            return {"from": NAME, "kinds": kinds}
        kind = "as stored" if self.values is None else self.values.name
        return {"from": "the weights alone", "kinds": [kind], "embeddings": self.embeddings}

    def pattern(self, candidate: Candidate) -> str | None:
        found = self._patterns.get(candidate.source)
        return None if found == "as-is" else found  # its zeros are older than that run

    def of(self, candidate: Candidate) -> tuple[Values, Tensor, Tensor | None] | None:
        """Kind, numbers (out, in) and scales (out, groups); None where the tensor stays as it is."""
        if self.codes is not None and candidate.source in self.codes.names:
            return self._from_file(candidate, self.codes)
        kind = self._kind(candidate)
        if kind is None:
            return None
        if kind.float_dtype is not None:
            numbers = kind.numbers(self._weight(candidate))
            self.negative_zeros += int((numbers == torch.iinfo(numbers.dtype).min).sum())
            return kind, numbers, None
        return kind, *self.fitted(candidate, Grid.parse(kind.name))

    def coded(self, candidate: Candidate) -> Values | None:
        """The kind of codes that ``of`` gives, for targets that store everything else as floats of their own choice.

        Raises:
            UserError: the codes beside the model are others than what was asked for.
        """
        if self.codes is not None and candidate.source in self.codes.names:
            has = str(self.codes.grid(candidate.source))
            self._refuse_other(candidate, has)
            return Values.parse(has)
        if self.codes is not None:
            self._kind(candidate)  # refuses --embeddings that the codes contradict
            return None
        if candidate.table or candidate.head:
            return None if self.embeddings == "keep" else Values.parse(self.embeddings)
        return None if self.values is None or self.values.float_dtype is not None else self.values

    def _kind(self, candidate: Candidate) -> Values | None:
        stored = Values.of(self.checkpoint.dtype(candidate.source))
        asked = self.values
        if self.codes is not None:
            if candidate.table or candidate.head:
                self._refuse_other(candidate, "keep")
            asked = None
        elif candidate.table or candidate.head:
            if self.embeddings != "keep":
                return Values.parse(self.embeddings)
            asked = None
        if candidate.table:
            return None
        if asked is not None and asked.float_dtype is not None and asked != stored:
            has = str(self.checkpoint.dtype(candidate.source)).removeprefix("torch.")
            raise UserError(
                f"--values {asked.name} was asked for, but {candidate.source} is stored as {has}; leave --values out "
                "to keep it bit for bit, or ask for int8 or int4:32"
            )
        return asked or stored

    def _from_file(self, candidate: Candidate, codes: GridFile) -> tuple[Values, Tensor, Tensor]:
        self._refuse_other(candidate, str(codes.grid(candidate.source)))
        codes.check(candidate.source, self._weight(candidate))
        kind = Values.parse(str(codes.grid(candidate.source)))
        return kind, codes.codes(candidate.source), codes.scales(candidate.source).bfloat16()

    def _refuse_other(self, candidate: Candidate, has: str) -> None:
        """Refuse another grid than the one that the codes beside the model have."""
        table = candidate.table or candidate.head
        asked = self.asked_embeddings if table else self.values.name if self.values else None
        if asked is not None and asked != has:
            option = "--embeddings" if table else "--values"
            raise UserError(
                f"{option} {asked} was asked for, but {NAME} beside the model has {candidate.source} as {has}; leave "
                f"{option} out to export these, or delete {NAME} to round the weights anew"
            )

    def _weight(self, candidate: Candidate) -> Tensor:
        tensor = self.checkpoint.tensor(candidate.source)
        return tensor.T if candidate.transposed else tensor

    def fitted(self, candidate: Candidate, grid: Grid) -> tuple[Tensor, Tensor]:
        """The nearest codes and scales, a panel of rows at a time."""
        weight = self._weight(candidate)
        codes = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(weight.shape[0], grid.groups(weight.shape[1]), dtype=torch.bfloat16)
        for first, last in bits.panels(*weight.shape):
            panel = weight[first:last].float()
            if not bool(panel.isfinite().all()):
                raise UserError(
                    f"{candidate.source} holds values that are not finite; no code can stand for them"
                )
            codes[first:last], scales[first:last] = grid.nearest(panel, panel != 0)
        return codes, scales


def _patterns(checkpoint: Checkpoint) -> dict[str, str]:
    """Weight name -> what prune says it was pruned to."""
    file = checkpoint.folder / "report.json"
    try:
        rows = json.loads(file.read_text("utf-8"))["weights"] if file.is_file() else []
        return {row["name"]: str(row["pattern"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        return {}
