"""The sparse model while it is trained: its parameters, what stands behind them, and how they are written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse import gridfile
from llmsparse.extent import Extent
from llmsparse.recovery import Recovery
from llmsparse.skeleton import Weight
from llmsparse.tables import round_table
from llmsparse.trained import Kept, LowRank, Rounded, Spliced, Trained
from llmsparse.work import verify
from llmsparse.writer import Writer

MASTERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Student:
    """A whole model on ``device``; ``trained`` holds the parameters of ``extent``, and norms and biases, by name."""

    def __init__(self, extent: Extent, options: Recovery, device: torch.device) -> None:
        self.extent, self.options, self.device = extent, options, device
        self.skeleton, self.master = extent.skeleton, MASTERS[options.master]
        self.model: Any = self.skeleton.materialize_all(self.master, device)
        self._use_codes()
        self.masks = {name: mask.to(device) for name, mask in extent.masks().items()}
        self.trained: dict[str, Trained] = {}
        for number, name in enumerate(dict.fromkeys(w.parameter for w in extent.weights)):
            self.trained[name] = self._trained(name, number)
        if options.train == "linears+norms":
            self.trained |= {name: Kept(self.model.get_parameter(name).data) for name in self._vectors()}
        inner = {n: t.inner if isinstance(t, Rounded) else t for n, t in self.trained.items()}
        self.spliced = {n: t for n, t in inner.items() if isinstance(t, Spliced)}
        self.place()

    def _use_codes(self) -> None:
        """Where codes lie beside the weights, begin with code times scale; round the tables that have none yet."""
        extent, checkpoint, codes = self.extent, self.skeleton.checkpoint, self.extent.codes
        coded = [w for w in extent.weights if codes is not None and w.name in codes.names]
        for weight, view in zip(coded, self.skeleton.views(coded).values(), strict=True):
            assert codes is not None
            view.copy_(codes.checked(weight.name, weight.stored(checkpoint.tensor(weight.source))))
        parameters = {
            self.skeleton.sources[f"{path}.weight"][0][0]: f"{path}.weight" for path in self.skeleton.tables
        }
        for name, grid in extent.tables.items():
            values = self.model.get_parameter(parameters[name]).data
            if codes is not None:
                values.copy_(codes.checked(name, checkpoint.tensor(name)))
            else:
                round_table(values, grid)

    def _trained(self, name: str, number: int) -> Trained:
        """What stands behind one parameter; on grids with the scales of the codes beside it, or with fitted ones."""
        options, mask = self.options, self.masks.get(name)
        values, views = self.model.get_parameter(name).data, self._views_of(name)
        grids = {n: self.extent.grids[n] for n in views(values) if n in self.extent.grids}
        inner: Trained
        if options.train == "lora":
            inner = LowRank(values, mask, options.rank, options.seed * 100003 + number)
        elif options.masks == "splice" and mask is not None:
            inner = Spliced(values, mask)
        else:
            inner = Kept(values.clone() if grids else values, mask)
        if not grids:
            return inner
        shown, codes, scales = views(inner.value()), self.extent.codes, dict[str, Tensor]()
        for weight, grid in grids.items():
            same = codes is not None and weight in codes.names and codes.grid(weight) == grid
            found = (
                codes.scales(weight)
                if codes and same
                else grid.fit(shown[weight].float(), shown[weight] != 0)
            )
            scales[weight] = found.to(self.device)
        return Rounded(inner, views, grids, scales)

    def _views_of(self, name: str) -> Callable[[Tensor], dict[str, Tensor]]:
        weights = [w for w in self.extent.weights if w.parameter == name]
        return lambda tensor: self.skeleton.views(weights, {name: tensor})

    def _vectors(self) -> list[str]:
        """Norms and biases in the blocks and after them that are tensors of their own on disk."""
        sources = self.skeleton.sources
        plain = {name for name, parts in sources.items() if len(parts) == 1 and parts[0][1] is None}
        return [n for n, p in self.model.named_parameters() if p.dim() == 1 and n in plain]

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
        revived, patterns = 0, self.extent.patterns
        for name, each in self.spliced.items():
            views = self._views_of(name)
            names = views(each.mask)
            revived += each.choose(views, {n: patterns[n] for n in names if n in patterns})
        return revived

    def fix(self) -> None:
        """Let the masks stay as they are."""
        for each in self.spliced.values():
            each.fixed = True

    def values(self) -> dict[str, Tensor]:
        """The trained parameters as the model has them."""
        return {name: self.model.get_parameter(name).data for name in self.trained}

    def current_masks(self) -> dict[str, Tensor]:
        """The masks of those that have some, as they are now."""
        return {
            name: self.spliced[name].mask if name in self.spliced else mask
            for name, mask in self.masks.items()
        }

    @torch.no_grad()
    def write(
        self, writer: Writer, values: dict[str, Tensor], masks: dict[str, Tensor]
    ) -> list[dict[str, Any]]:
        """Put ``values`` on disk under the source's names; a row for each weight that is pruned or on a grid.

        Every number outside ``masks`` (True = kept, both by parameter) must be zero.
        """
        rows, skeleton, weights = [], self.skeleton, self.extent.weights
        by_source: dict[str, list[Weight]] = {}
        for weight in weights:
            by_source.setdefault(weight.source, []).append(weight)
        views = skeleton.views(weights, values)
        held = skeleton.views([w for w in weights if w.parameter in masks], masks)
        for source, inside in by_source.items():
            tensors = {source: skeleton.checkpoint.tensor(source).clone()}
            for weight in inside:
                row, codes = self._store(
                    weight, views[weight.name], held.get(weight.name), weight.stored(tensors[source])
                )
                rows += [row] if row else []
                tensors |= codes
            writer.write(tensors | dict.fromkeys(skeleton.same_as(source), tensors[source]))
        for name in set(values) - {w.parameter for w in weights}:
            source = skeleton.sources[name][0][0]
            writer.write({source: values[name].to(skeleton.checkpoint.dtype(source))})
        return rows

    def _store(
        self, weight: Weight, value: Tensor, mask: Tensor | None, stored: Tensor
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Put one weight into ``stored`` (out, in); what the report says of it, and its codes."""
        trained, codes, row = self.trained[weight.parameter], dict[str, Tensor](), dict[str, Any]()
        if isinstance(trained, Rounded) and (grid := trained.grids.get(weight.name)):
            scales = trained.scales[weight.name].to(value.device)
            found = grid.codes(value.float(), scales)
            value, row["values"] = grid.values(found, scales), str(grid)
            codes = gridfile.tensors(weight.name, found.cpu(), scales.cpu())
        stored.copy_(value + 0.0)  # no zero is negative
        verify(
            weight.name,
            stored,
            torch.ones_like(stored, dtype=torch.bool) if mask is None else mask.to(stored.device),
        )
        if weight.name in self.extent.kept or codes:
            shape = [weight.out_features, weight.in_features]
            sparsity = 0.0 if mask is None else float((~mask).float().mean())  # not what rounding made
            row |= {"name": weight.name, "shape": shape, "sparsity": sparsity}
        return row, codes

    @torch.no_grad()
    def write_tables(self, writer: Writer) -> list[dict[str, Any]]:
        """Put the tables that have codes on disk; a row for each that was rounded now."""
        rows, given = [], self.extent.codes
        for name, grid in self.extent.tables.items():
            stored = self.skeleton.checkpoint.tensor(name).clone()
            if given is not None:
                codes = gridfile.tensors(name, given.codes(name), given.scales(name))
            else:
                table = round_table(stored, grid)
                codes = table.tensors(name)
                rows.append(table.row(name, grid))
            writer.write(dict.fromkeys([name, *self.skeleton.same_as(name)], stored) | codes)
        return rows

    def written(self) -> set[str]:
        """Names on disk of all that is put there."""
        weights = self.extent.weights
        names = {w.source for w in weights} | set(self.extent.tables)
        names |= {self.skeleton.sources[n][0][0] for n in set(self.trained) - {w.parameter for w in weights}}
        return names | {other for name in names for other in self.skeleton.same_as(name)}
