"""Muon for the matrices of a network, AdamW for the rest, the course of the learning rate, and the average of the weights."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dreambooth.ranks import ALONE, Ranks

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan 2024
ITERATIONS = 5
SMALLEST_SIDE = 16  # matrices below this gain nothing from being made orthogonal
ENDS = ("emb", "conv_in", "conv_out", "quant_conv", "stem", "head", "projection", "logit_scale")  # first and last layers, embeddings: AdamW
GATED = ("ff.net.",)  # feed-forward layers with gates, AdamW too: by Muon the gates shut, for good, as a full step is made of no gradient as well


def orthogonalize(matrices: Tensor) -> Tensor:
    """Returns the matrices (K, m, n) with all their singular values near 1, by Newton-Schulz iteration: in bfloat16 on a GPU.

    On a CPU it is in float32, as many have no fast bfloat16 (10 times slower on one of ours).

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.mT if is_tall else x  # (K, m, n) with m <= n
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = _from_gram(x) if not x.is_cuda and x.shape[-1] >= 2 * x.shape[-2] else _directly(x)
    return (x.mT if is_tall else x).to(matrices.dtype)


def _directly(x: Tensor) -> Tensor:
    """Returns the iterations' result by products of the size of `x`, (K, m, n)."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _from_gram(x: Tensor) -> Tensor:
    """Returns the same by products of (K, m, m) alone but for two: every step multiplies from the left by a polynomial of the Gram matrix.

    For the convolutions of a UNet, nine times as wide as high, this takes about a quarter of the time on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    gram, product, identity = x @ x.mT, None, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for iteration in range(ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor if product is None else factor @ product
        if iteration + 1 < ITERATIONS:
            gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is made orthogonal; a convolution counts as (out, in * kernel).

    torch.optim.Muon (2.13) takes matrices only, no convolutions, and works through them one by one; this one takes all weights of one
    shape in one batched product, which is what makes it cheap on a GPU. On a single matrix the two agree (a test holds that).

    Args:
        params: weights of two dimensions or more.
        lr: length of the update, as a spectral norm.
        momentum: share of the past in the (Nesterov) momentum, in [0, 1).
        weight_decay: share of a weight that a step of length 1 takes away, apart from the gradient. Without it the matrices only grow.
        ranks: processes that train the same weights with the same gradients: each makes its share of the updates orthogonal, for all.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0, ranks: Ranks = ALONE) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every weight that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault((len(weight), weight[0].numel()), []).append(weight)
            stacks = [
                torch.stack([self._momentum(weight, group["momentum"]).reshape(shape) for weight in weights])  # (K, m, n)
                for shape, weights in shapes.items()
            ]
            updates = [self._share(stack) for stack in stacks]
            self.ranks.add_up(updates)
            for (rows, columns), weights, stack in zip(shapes, shapes.values(), updates, strict=True):
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for weight, update in zip(weights, stack, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.reshape(weight.shape), alpha=-scale)

    def _share(self, stack: Tensor) -> Tensor:
        """Returns the orthogonal updates of this rank's share of the matrices (K, m, n), and zeros for those of the others."""
        if self.ranks.count == 1:
            return orthogonalize(stack)
        updates, own = torch.zeros_like(stack), slice(self.ranks.index, None, self.ranks.count)
        if len(stack[own]):
            updates[own] = orthogonalize(stack[own])
        return updates

    def _momentum(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """Returns the Nesterov momentum of one weight, and keeps the plain one."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight.grad)
        state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum"], momentum)


def make_optimizers(
    modules: Sequence[nn.Module], matrix_lr: float, other_lr: float, matrix_decay: float = 0.0, ranks: Ranks = ALONE
) -> list[torch.optim.Optimizer]:
    """Returns Muon over the hidden matrices of the modules and AdamW over everything else.

    Args:
        modules: what is trained.
        matrix_lr: of Muon; 0.02 in most reports. 0 leaves everything to AdamW.
        other_lr: of AdamW.
        matrix_decay: weight decay of Muon.
        ranks: as for `Muon`.
    """
    hidden, others = [], []
    for module in modules:
        for name, weight in module.named_parameters():
            is_matrix = weight.ndim >= 2 and min(len(weight), weight[0].numel()) >= SMALLEST_SIDE
            is_hidden = matrix_lr > 0 and is_matrix and not any(part in name for part in (*ENDS, *GATED))
            (hidden if is_hidden else others).append(weight)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    return [*optimizers, Muon(hidden, matrix_lr, weight_decay=matrix_decay, ranks=ranks)] if hidden else optimizers


def learning_rate_factor(step: int, total: int | None, warmup: int = 100, constant: float = 0.5) -> float:
    """Returns the share of the full learning rate at a step: a linear start, a constant stretch, a straight line to (nearly) zero.

    Args:
        step: from 0.
        total: steps of the whole training; None while it is not yet known, which is only in the beginning.
        warmup: steps of the start; never more than a tenth of all.
        constant: share of all steps before the rate falls.
    """
    rise = min(1.0, (step + 1) / max(1, warmup if total is None else min(warmup, total // 10)))
    if total is None:
        return rise
    left = (total - step) / max(1.0, total * (1 - constant))
    return rise * min(1.0, max(0.0, left))


def average_into(averages: Sequence[Tensor], weights: Sequence[Tensor], step: int, width: float = 0.05) -> None:
    """Moves a running average of weights towards the present ones; it spans about `width` of all steps so far.

    Unlike a fixed decay this needs no tuning to the length of the training (the power-function average of Karras et al. 2024, sec. 3.1).

    Args:
        averages, weights: tensors in the same order; the averages are changed.
        step: from 0; the first step copies.
    """
    with torch.no_grad():
        torch._foreach_lerp_(list(averages), list(weights), 1.0 / (1.0 + width * step))
