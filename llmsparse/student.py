"""The sparse model while it is trained: which parameters are, under which masks and on which grids."""

from typing import Any

import torch
from torch import Tensor, nn

from llmsparse import gridfile
from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.gridfile import GridFile
from llmsparse.pattern import NM, Existing, Pattern, Unstructured, parse_mask
from llmsparse.recovery import Recovery
from llmsparse.skeleton import Skeleton, Weight
from llmsparse.tables import round_table
from llmsparse.trained import Kept, LowRank, Rounded, Spliced, Trained
from llmsparse.work import verify
from llmsparse.writer import Writer

TABLES = Grid(8)  # of embedding and output tables, where the weights get a grid


class Student:
    """A whole model on ``device``; ``trained`` holds its trained parameters by name.

    Weights are the linear ones of its blocks, and any other that is pruned. ``masks`` (of the parameter's shape, True =
    kept) are of those of which a fifth or more is zero.
    """

    def __init__(self, skeleton: Skeleton, options: Recovery, device: torch.device, patterns: dict[str, str]):
        self.skeleton, self.options, self.device = skeleton, options, device
        self.master = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.master]
        self.model: Any = skeleton.materialize_all(self.master, device)
        self.codes = GridFile.open(skeleton.checkpoint.folder)
        weights = skeleton.weights
        self._use_codes(weights)
        kept = {name: Existing().select(view.abs()) for name, view in skeleton.views(weights).items()}
        pruned = {name for name, mask in kept.items() if not bool(mask.all())}
        self.weights = [w for w in weights if w.block is not None or w.name in pruned]
        self.grid = self._grid(weights)
        self.tables = self._tables()
        self.masks = self._masks(kept, pruned)
        self.patterns = {name: counted(kept[name], patterns.get(name)) for name in pruned}
        self.pruned = pruned
        self.trained: dict[str, Trained] = {}
        for number, name in enumerate(dict.fromkeys(w.parameter for w in self.weights)):
            self.trained[name] = self._rounded(name, self._weight(name, number))
        if options.train == "linears+norms":
            self.trained |= {name: Kept(self.model.get_parameter(name).data) for name in self._vectors()}
        self.spliced = {n: t for n, t in self._inner().items() if isinstance(t, Spliced)}
        self.place()

    def _use_codes(self, weights: list[Weight]) -> None:
        """Where codes lie beside the weights, begin with code times scale."""
        if self.codes is None:
            return
        views = self.skeleton.views([w for w in weights if w.name in self.codes.names])
        for weight in [w for w in weights if w.name in views]:
            stored = weight.stored(self.skeleton.checkpoint.tensor(weight.source))
            views[weight.name].copy_(self.codes.checked(weight.name, stored))

    def _grid(self, weights: list[Weight]) -> Grid | None:
        """What is asked for, else that of the codes beside the weights."""
        if self.options.values is not None:
            return Grid.parse(self.options.values)
        named = [w.name for w in weights if self.codes and w.name in self.codes.names]
        return self.codes.grid(named[0]) if self.codes and named else None

    def _tables(self) -> dict[str, Grid]:
        """Embedding and output tables with codes, by name on disk: those that have some, else all, rounded to int8."""
        if self.grid is None:
            return {}
        trained = {w.source for w in self.weights}
        names = {
            self.skeleton.sources[f"{path}.weight"][0][0]: f"{path}.weight" for path in self.skeleton.tables
        }
        found = {}
        for name, parameter in names.items():
            coded = self.codes is not None and name in self.codes.names
            if name in trained or (self.codes is not None and not coded):
                continue
            values = self.model.get_parameter(parameter).data
            if self.codes is not None:
                found[name] = self.codes.grid(name)
                values.copy_(self.codes.checked(name, self.skeleton.checkpoint.tensor(name)))
            else:
                found[name] = TABLES
                round_table(values, TABLES)
        return found

    def _masks(self, kept: dict[str, Tensor], pruned: set[str]) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for parameter in dict.fromkeys(w.parameter for w in self.weights if w.name in pruned):
            masks[parameter] = torch.ones_like(self.model.get_parameter(parameter), dtype=torch.bool)
        for name, view in self.skeleton.views(
            [w for w in self.weights if w.parameter in masks], masks
        ).items():
            view.copy_(kept[name])
        return masks

    def _weight(self, name: str, number: int) -> Trained:
        values, mask = self.model.get_parameter(name).data, self.masks.get(name)
        if self.options.train == "lora":
            return LowRank(values, mask, self.options.rank, self.options.seed * 100003 + number)
        if self.options.masks == "splice" and mask is not None:
            return Spliced(values, mask)
        return Kept(values if self.grid is None else values.clone(), mask)

    def _rounded(self, name: str, inner: Trained) -> Trained:
        """The same on the grid, with the scales that the codes beside the weights have, or with fitted ones."""
        if self.grid is None:
            return inner
        views, scales = self._views_of(name), dict[str, Tensor]()
        for weight, view in views(inner.value()).items():
            stored = (
                self.codes is not None and weight in self.codes.names and self.codes.grid(weight) == self.grid
            )
            found = (
                self.codes.scales(weight) if self.codes and stored else self.grid.fit(view.float(), view != 0)
            )
            scales[weight] = found.to(self.device)
        return Rounded(inner, views, self.grid, scales)

    def _views_of(self, name: str) -> Any:
        weights = [w for w in self.weights if w.parameter == name]
        return lambda tensor: self.skeleton.views(weights, {name: tensor})

    def _vectors(self) -> list[str]:
        """Norms and biases in the blocks and after them that are tensors of their own on disk."""
        sources = self.skeleton.sources
        plain = {name for name, parts in sources.items() if len(parts) == 1 and parts[0][1] is None}
        return [n for n, p in self.model.named_parameters() if p.dim() == 1 and n in plain]

    def _inner(self) -> dict[str, Trained]:
        return {n: t.inner if isinstance(t, Rounded) else t for n, t in self.trained.items()}

    @property
    def masters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [master for each in self.trained.values() for master in each.masters]

    def lighten(self, dtype: torch.dtype) -> None:
        """Hold the output table in ``dtype``, if it is not trained: else every chunk of tokens would convert it anew."""
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and not any(
            head.weight is self.model.get_parameter(n) for n in self.trained
        ):
            head.weight = nn.Parameter(head.weight.data.to(dtype), requires_grad=False)

    @torch.no_grad()
    def place(self) -> None:
        """Give the model what its masters make of its parameters."""
        for name, each in self.trained.items():
            parameter, value = self.model.get_parameter(name), each.value()
            if value.data_ptr() != parameter.data_ptr():
                parameter.data.copy_(value)

    @torch.no_grad()
    def take(self) -> None:
        """Hand the gradients of the model's parameters on to the masters."""
        for name, each in self.trained.items():
            parameter = self.model.get_parameter(name)
            for master in each.masters:
                master.grad = None
            if parameter.grad is not None:
                grad, parameter.grad = parameter.grad, None
                each.take(grad)

    def train(self, on: bool) -> None:
        """Let the parameters that are trained have gradients, or not."""
        for name in self.trained:
            self.model.get_parameter(name).requires_grad_(on)

    @torch.no_grad()
    def splice(self) -> int:
        """Choose the masks again; how many weights came back."""
        revived = 0
        for name, each in self.spliced.items():
            views = self._views_of(name)
            names = views(each.mask)
            revived += each.choose(views, {n: self.patterns[n] for n in names if n in self.patterns})
        return revived

    def fix(self) -> None:
        """Let the masks stay as they are."""
        for each in self.spliced.values():
            each.fixed = True

    def values(self) -> dict[str, Tensor]:
        """The trained parameters as the model has them."""
        return {name: self.model.get_parameter(name).data for name in self.trained}

    @torch.no_grad()
    def write(self, writer: Writer, values: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Put ``values`` on disk under the source's names; a row for each weight that is pruned or on a grid."""
        rows = []
        by_source: dict[str, list[Weight]] = {}
        for weight in self.weights:
            by_source.setdefault(weight.source, []).append(weight)
        views = self.skeleton.views(self.weights, values)
        for source, weights in by_source.items():
            tensors = {source: self.skeleton.checkpoint.tensor(source).clone()}
            for weight in weights:
                row, codes = self._stored(weight, views[weight.name], weight.stored(tensors[source]))
                rows += [row] if row else []
                tensors |= codes
            writer.write(tensors | dict.fromkeys(self.skeleton.same_as(source), tensors[source]))
        for name in set(values) - {w.parameter for w in self.weights}:
            source = self.skeleton.sources[name][0][0]
            writer.write({source: values[name].to(self.skeleton.checkpoint.dtype(source))})
        return rows

    @torch.no_grad()
    def write_tables(self, writer: Writer) -> list[dict[str, Any]]:
        """Put the tables that have codes on disk; a row for each that was rounded now."""
        rows = []
        for name, grid in self.tables.items():
            stored = self.skeleton.checkpoint.tensor(name).clone()
            if self.codes is not None:
                codes = gridfile.tensors(name, self.codes.codes(name), self.codes.scales(name))
            else:
                table = round_table(stored, grid)
                codes = table.tensors(name)
                rows.append(table.row(name, grid))
            writer.write(dict.fromkeys([name, *self.skeleton.same_as(name)], stored) | codes)
        return rows

    def _stored(
        self, weight: Weight, value: Tensor, stored: Tensor
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        mask, codes = value != 0, dict[str, Tensor]()
        stored.copy_(torch.where(mask, value, 0.0))
        verify(weight.name, stored, mask.to(stored.device))
        row: dict[str, Any] = {}
        if weight.name in self.pruned or self.grid:
            shape = [weight.out_features, weight.in_features]
            row = {"name": weight.name, "shape": shape, "sparsity": float((stored == 0).float().mean())}
        trained = self.trained[weight.parameter]
        if isinstance(trained, Rounded):
            scales = trained.scales[weight.name].to(value.device)
            codes = gridfile.tensors(weight.name, trained.grid.codes(value, scales).cpu(), scales.cpu())
            row["values"] = str(trained.grid)
        return row, codes

    def quantised(self) -> dict[str, tuple[tuple[int, int], Grid]]:
        """Everything that gets codes: name -> its (out, in) shape and its grid."""
        if self.grid is None:
            return {}
        shapes = {w.name: (w.out_features, w.in_features) for w in self.weights}
        shapes |= {name: self.skeleton.checkpoint.shape(name) for name in self.tables}  # type: ignore[misc]
        return {name: (shape, self.tables.get(name) or self.grid) for name, shape in shapes.items()}

    def written(self) -> set[str]:
        """Names on disk of all that ``write`` puts there."""
        names = {w.source for w in self.weights}
        names |= {
            self.skeleton.sources[n][0][0]
            for n in self.trained
            if n not in {w.parameter for w in self.weights}
        }
        names |= set(self.tables)
        return names | {other for name in names for other in self.skeleton.same_as(name)}


def counted(mask: Tensor, asked: str | None) -> Pattern:
    """The pattern that ``mask`` (out, in) satisfies exactly: n:m where that was ``asked`` for, else its count of zeros."""
    try:
        pattern = parse_mask(asked) if asked else None
    except UserError:
        pattern = None
    if isinstance(pattern, NM) and pattern.allows(mask):
        return pattern
    zeros = (~mask).sum(1)
    scope = "row" if bool((zeros == zeros[0]).all()) else "layer"
    return Unstructured(float(zeros.sum()) / mask.numel(), scope)
