"""Optimisers: Adam as published, AdamW, and Muon for the hidden convolutions with AdamW for everything else.

A step whose `bad` is 1 is skipped on the device, without waiting for it.  The state is a table of named tensors.
To add one: a function that selects the parameters for Muon, and a row in OPTIMIZERS.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MUON_LR_FACTOR = 10.0  # Muon's learning rate over AdamW's: its update has unit norm whatever the gradient's size
MUON_MOMENTUM = 0.95


class Optimizer:
    """The named optimiser over a network's parameters."""

    def __init__(self, name: str, model: nn.Module):
        row = OPTIMIZERS[name]
        named = list(model.named_parameters())
        self.matrices = {key: parameter for key, parameter in named if row.by_muon(key, parameter)}
        self.others = {key: parameter for key, parameter in named if key not in self.matrices}
        self.momenta = {key: torch.zeros_like(parameter) for key, parameter in self.matrices.items()}
        self.averages = {key: torch.zeros_like(parameter) for key, parameter in self.others.items()}
        self.squares = {key: torch.zeros_like(parameter) for key, parameter in self.others.items()}
        self.counts = {key: torch.zeros((), device=parameter.device) for key, parameter in self.others.items()}
        self.betas = row.betas

    def step(self, lr: float, bad: Tensor) -> None:
        """One update from the parameters' gradients.  bad: a float scalar, 1 if the step must change nothing."""
        self._adam_step(lr, bad)
        self._muon_step(MUON_LR_FACTOR * lr, bad)

    @torch.no_grad()
    def _adam_step(self, lr: float, bad: Tensor) -> None:
        """Kingma & Ba (2015), algorithm 1: the kernel of torch.optim.AdamW, whose import would take two seconds.

        AdamW without weight decay is Adam.
        """
        with_gradient = [key for key, parameter in self.others.items() if parameter.grad is not None]
        parameters, averages, squares, counts = (
            [table[key] for key in with_gradient] for table in (self.others, self.averages, self.squares, self.counts)
        )
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_add_(counts, 1 - bad)
        # The kernel divides by 1 - beta^count, which would be zero if the very first step is skipped.
        torch._fused_adamw_(
            parameters, gradients, averages, squares, [], [count.clamp(min=1) for count in counts],
            lr=lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            found_inf=bad,
        )  # fmt: skip

    @torch.no_grad()
    def _muon_step(self, lr: float, bad: Tensor) -> None:
        """Jordan et al. (2024): momentum in Nesterov's form, orthogonalised as a matrix (out, in * k * k)."""
        by_shape: dict[torch.Size, list[str]] = {}
        for key, parameter in self.matrices.items():
            by_shape.setdefault(parameter.shape, []).append(key)
        good = 1 - bad
        for shape, keys in by_shape.items():
            parameters, momenta = [self.matrices[key] for key in keys], [self.momenta[key] for key in keys]
            # NaN times zero is NaN, so bad gradients are replaced rather than scaled.
            gradients = [
                torch.where(bad > 0, momentum, parameter.grad)
                for parameter, momentum in zip(parameters, momenta, strict=True)
            ]
            torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)
            torch._foreach_lerp_(gradients, momenta, MUON_MOMENTUM)
            matrices = torch.stack(gradients).flatten(2)  # (n, out, in * k * k)
            updates = orthogonalise(matrices) * good * max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
            torch._foreach_add_(parameters, list(updates.view(-1, *shape)), alpha=-lr)

    def tensors(self) -> dict[str, Tensor]:
        """Everything besides the weights that the next step depends on."""
        return dict(self._state())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`.  Raises KeyError or RuntimeError if the state is another network's."""
        for name, tensor in self._state():
            if state[name].shape != tensor.shape:
                raise RuntimeError(f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(state[name])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for key, momentum in self.momenta.items():
            yield f"muon/{key}", momentum
        for key in self.others:
            yield f"adamw/{key}/step", self.counts[key]
            yield f"adamw/{key}/exp_avg", self.averages[key]
            yield f"adamw/{key}/exp_avg_sq", self.squares[key]


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About the nearest (semi-)orthogonal matrices to (n, rows, columns): all singular values go to 0.7 .. 1.2.

    A quintic Newton-Schulz iteration with Jordan et al.'s coefficients.  Each iteration multiplies x from the left by a
    polynomial in x x^T.  The polynomials are multiplied together as small square matrices first, so x, whose columns
    are many in a convolution, takes part in two products instead of ten.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = torch.bmm(x, x.mT)
    whole = None
    for left in reversed(range(iterations)):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        whole = factor if whole is None else torch.bmm(factor, whole)
        if left:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    x = torch.bmm(whole, x)
    return x.mT if tall else x


def _hidden_convolution(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 4 and not name.startswith(("conv_in.", "conv_out."))


def _nothing(name: str, parameter: Tensor) -> bool:
    return False


@dataclass(frozen=True)
class OptimizerRow:
    """by_muon: whether Muon updates this parameter.  betas: of AdamW, which updates the others."""

    by_muon: Callable[[str, Tensor], bool]
    betas: tuple[float, float]


OPTIMIZERS = {
    "muon": OptimizerRow(_hidden_convolution, betas=(0.9, 0.99)),
    "adamw": OptimizerRow(_nothing, betas=(0.9, 0.99)),
    "adam": OptimizerRow(_nothing, betas=(0.9, 0.999)),  # Kingma & Ba (2015), algorithm 1
}
