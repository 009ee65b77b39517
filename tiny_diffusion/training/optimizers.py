"""Optimisers: AdamW, and Muon for the hidden convolutions with AdamW for everything else.

Both skip a step on the device where `bad` is 1, without waiting for it, and their state travels as named tensors.
To add one: a function that says which parameters Muon takes, a row in OPTIMIZERS.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

MUON_RATE = 10.0  # Muon's learning rate in AdamW's: its update has unit norm, whatever the gradient's size
MUON_MOMENTUM = 0.95
ADAMW = {"betas": (0.9, 0.99), "weight_decay": 0.0}


class Optimizer:
    """The named optimiser over a network's parameters."""

    def __init__(self, name: str, model: nn.Module):
        by_muon = OPTIMIZERS[name]
        named = list(model.named_parameters())
        self.matrices = {key: parameter for key, parameter in named if by_muon(key, parameter)}
        self.others = {key: parameter for key, parameter in named if key not in self.matrices}
        self.momenta = {key: torch.zeros_like(parameter) for key, parameter in self.matrices.items()}
        self.adamw = torch.optim.AdamW(self.others.values(), fused=True, **ADAMW)

    def step(self, lr: float, bad: Tensor) -> None:
        """One update from the gradients in place.  bad: a float scalar, 1 where the step must change nothing."""
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.grad_scale, self.adamw.found_inf = None, bad
        self.adamw.step()
        self._muon_step(MUON_RATE * lr, bad)

    @torch.no_grad()
    def _muon_step(self, lr: float, bad: Tensor) -> None:
        """Jordan et al. (2024): momentum in Nesterov's form, orthogonalised as a matrix (out, in * k * k)."""
        by_shape: dict[torch.Size, list[str]] = {}
        for key, parameter in self.matrices.items():
            by_shape.setdefault(parameter.shape, []).append(key)
        good = 1 - bad
        for shape, keys in by_shape.items():
            parameters, momenta = [self.matrices[key] for key in keys], [self.momenta[key] for key in keys]
            # NaN times zero is NaN, so bad gradients are replaced, not scaled.
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
        """Everything that the next step depends on besides the weights."""
        state = {f"muon/{key}": momentum for key, momentum in self.momenta.items()}
        for key, parameter in self.others.items():
            state |= {f"adamw/{key}/{name}": tensor for name, tensor in self.adamw.state.get(parameter, {}).items()}
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`.  Raises KeyError or RuntimeError if the state is another network's."""
        for key, momentum in self.momenta.items():
            momentum.copy_(state[f"muon/{key}"])
        if not any(name.startswith("adamw/") for name in state):
            return  # saved before its first step
        for key, parameter in self.others.items():
            held = {name: state[f"adamw/{key}/{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            average = {name: torch.empty_like(parameter).copy_(held[name]) for name in ("exp_avg", "exp_avg_sq")}
            self.adamw.state[parameter] = {
                "step": held["step"].to(parameter.device, torch.float32, copy=True),
                **average,
            }


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About the nearest (semi-)orthogonal matrices to (n, rows, columns): all singular values go to 0.7 .. 1.2.

    A quintic Newton-Schulz iteration with Jordan et al.'s coefficients, in bfloat16 where that is fast.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _hidden_convolution(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 4 and not name.startswith(("conv_in.", "conv_out."))


OPTIMIZERS: dict[str, Callable[[str, Tensor], bool]] = {
    "muon": _hidden_convolution,
    "adamw": lambda name, parameter: False,
}
