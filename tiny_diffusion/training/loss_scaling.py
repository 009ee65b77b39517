"""Loss scaling, which keeps small gradients from becoming zero in fp16.  Micikevicius et al. (2018), section 3.2."""

import torch
from torch import Tensor

FIRST_SCALE = 2.0**15
STEPS_UNTIL_DOUBLED = 1000


class LossScaler:
    """Multiplies the loss before the backward pass and divides the gradients after it.  Does nothing unless enabled.

    state: (2,) on the device: the scale, and the number of finite steps since it last changed.
    """

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.state = torch.tensor([FIRST_SCALE if enabled else 1.0, 0.0], device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.state[0] if self.enabled else loss

    def unscale_(self, gradients: list[Tensor]) -> None:
        """Divides the gradients by the scale, in place."""
        if self.enabled:
            torch._foreach_div_(gradients, self.state[0])

    def update(self, bad: Tensor) -> None:
        """Halves the scale after a step that was not finite, and doubles it after STEPS_UNTIL_DOUBLED finite ones.

        bad: a float scalar, 1 for a step that was not finite.
        """
        if self.enabled:
            scale, finite_steps = self.state
            finite_steps = (finite_steps + 1) * (1 - bad)
            doubled = (finite_steps >= STEPS_UNTIL_DOUBLED).float()
            self.state = torch.stack([scale * (1 - 0.5 * bad) * (1 + doubled), finite_steps * (1 - doubled)])
