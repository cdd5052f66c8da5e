"""Plain loops of published methods, in float64, row by row where the code under test takes all rows at once."""

import torch
from torch import Tensor

from llmsparse.pattern import NM, Unstructured
from tests.solvers.test_oracle import mask_of


def damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram with ones for dead inputs and a share of its mean diagonal."""
    found = gram.clone()
    strength = damping * found.diagonal().mean()
    found += torch.diag((found.diagonal() == 0).to(found.dtype))
    return found + strength * torch.eye(len(found), dtype=found.dtype)


def least_squares(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """For each row the best weights with that mask: G_SS x = (G w)_S."""
    found = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        support = kept.nonzero().flatten()
        right = (gram @ weight[row])[support]
        found[row, support] = torch.linalg.solve(gram[support][:, support], right)
    return found


def conjugate_gradients(weight: Tensor, start: Tensor, mask: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Of each row, on the system of its support alone, scaled by the diagonal."""
    found = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        support = kept.nonzero().flatten()
        system, scale = gram[support][:, support], gram.diagonal()[support]
        x = start[row, support].clone()
        residual = (gram @ weight[row])[support] - system @ x
        direction = residual / scale
        for _ in range(steps):
            power = residual @ (residual / scale)
            if power < 1e-30:
                break
            length = power / (direction @ (system @ direction))
            x += length * direction
            residual = residual - length * (system @ direction)
            direction = residual / scale + (residual @ (residual / scale)) / power * direction
        found[row, support] = x
    return found


def row_error(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """e G eT of each row with e what the mask leaves out."""
    lost = weight * ~mask
    return ((lost @ gram) * lost).sum(1)


def alps(
    weight: Tensor, gram: Tensor, pattern: Unstructured | NM, every: int, still: float, steps: int
) -> Tensor:
    """ALPS with an eigendecomposition, as published; penalties rise by powers of 1.1."""
    gram = damped(gram, 0.01)
    norms = gram.diagonal().sqrt()
    scaled = gram / torch.outer(norms, norms)
    values, vectors = torch.linalg.eigh(scaled)
    target = weight * norms
    penalty, dual, moves = 0.1, torch.zeros_like(target), 0
    before = mask_of(target.abs(), pattern, "layer")
    sparse = target * before
    for iteration in range(1, 301):
        right = target @ scaled - dual + penalty * sparse
        free = (right @ vectors / (values + penalty)) @ vectors.T
        mask = mask_of((free + dual / penalty).abs(), pattern, "layer")
        sparse = (free + dual / penalty) * mask
        dual = dual + penalty * (free - sparse)
        if iteration % every == 0:
            moved = float((mask & ~before).sum()) / float(mask.sum())
            moves += moved > still
            if moved <= still and (moves or iteration >= 5 * every):
                break
            penalty *= 1.1 ** (3 if moved > 0.1 else 2 if moved > 0.005 else 1 if moved > 0 else 0)
            before = mask
    return conjugate_gradients(target, free, mask, scaled, steps) / norms


def admm(weight: Tensor, gram: Tensor, pattern: Unstructured | NM) -> Tensor:
    """Boža's iteration with explicit inverse, the cubic schedule and the published constants."""
    gram = damped(gram, 0.01)
    norms = gram.diagonal().sqrt()
    scaled = gram / torch.outer(norms, norms) + 0.1 * torch.eye(len(gram), dtype=gram.dtype)
    target = weight * norms
    inverse = torch.linalg.inv(scaled + torch.eye(len(gram), dtype=gram.dtype))
    value, dual = target.clone(), torch.zeros_like(target)
    for iteration in range(20):
        score = (value + dual).abs()
        if iteration < 15:
            mask = mask_of(score, pattern, "layer")
            spared = round((1 - (iteration + 1) / 15) ** 3 * int((~mask).sum()))
            rest = torch.where(mask, torch.tensor(-1.0, dtype=score.dtype), score).flatten()
            extra = torch.zeros(rest.numel(), dtype=torch.bool)
            extra[rest.sort(descending=True, stable=True).indices[:spared]] = True
            mask = mask | extra.view_as(mask)
        sparse = (value + dual) * mask
        dual = dual + value - sparse
        value = (target @ scaled + sparse - dual) @ inverse
    return (value + dual) * mask / norms


def thanos(weight: Tensor, gram: Tensor, pattern: Unstructured | NM, chunk: int = 128) -> Tensor:
    """Thanos with the inverse of each trailing Gram, a row's system at a time."""
    norms, dead = gram.diagonal().sqrt(), gram.diagonal() == 0
    gram, weight = damped(gram, 0.01), weight.clone()
    weight[:, dead] = 0.0
    rows, inputs = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, inputs, chunk):
        end = min(start + chunk, inputs)
        score = weight[:, start:].abs() * norms[start:]
        if isinstance(pattern, NM):
            chosen = mask_of(score[:, : end - start], pattern, "")
        elif pattern.scope == "row":
            chosen = torch.ones_like(score, dtype=torch.bool)
            for row in range(rows):
                left = round(pattern.sparsity * inputs) - int((~mask[row]).sum())
                order = score[row].flip(0).sort(stable=True).indices[:left]
                chosen[row, score.shape[1] - 1 - order] = False
        else:
            left = round(pattern.sparsity * weight.numel()) - int((~mask).sum())
            order = score.flatten().flip(0).sort(stable=True).indices[:left]
            flat = torch.ones(score.numel(), dtype=torch.bool)
            flat[score.numel() - 1 - order] = False
            chosen = flat.view_as(score)
        mask[:, start:end] = chosen[:, : end - start]
        inverse = torch.linalg.inv(gram[start:, start:])
        for row in range(rows):
            pruned = (~mask[row, start:end]).nonzero().flatten()
            if len(pruned):
                factor = torch.linalg.solve(inverse[pruned][:, pruned], weight[row, start:][pruned])
                weight[row, start:] -= factor @ inverse[pruned]
    return weight * mask
