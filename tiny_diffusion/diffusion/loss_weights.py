"""Loss weights: how much an error counts at each noise level.

A weight is a function of (alpha, sigma) that multiplies the loss of x_0.  An error e of the network's output is an
error of ``sigma / |det| * e`` in x_0, so a weighted loss is one objective whatever the network predicts.  Only
``uniform`` is stated on the output itself.  To add one: a function of (alpha, sigma), a row in LOSS_WEIGHTS.
"""

import numpy as np

from tiny_diffusion.diffusion.predictions import determinant

GAMMA = 5.0  # Hang et al. (2023), table 1
SIGMA_DATA = 0.5  # Karras et al. (2022), table 1: the standard deviation of images in [-1, 1]


def min_snr(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """min(SNR, gamma) on x_0.  Hang et al. (2023), section 3.4."""
    return np.minimum((alpha / sigma) ** 2, GAMMA)


def edm(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """(s^2 + d^2) / (s d)^2 on x_0, where s = sigma / alpha and d = SIGMA_DATA.  Karras et al. (2022), table 1.

    Both halves of the fraction are multiplied by alpha^2, so that it is finite at alpha = 0.
    """
    return (sigma**2 + (SIGMA_DATA * alpha) ** 2) / (SIGMA_DATA * sigma) ** 2


def output_weight(name: str, prediction: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weight, scale): the loss of the network's output is ``weight * loss(scale * error)``; both of alpha's shape."""
    weight = LOSS_WEIGHTS[name]
    if weight is None:
        return np.ones_like(alpha), np.ones_like(alpha)
    return weight(alpha, sigma), sigma / abs(determinant(prediction, alpha, sigma))


LOSS_WEIGHTS = {"uniform": None, "min_snr": min_snr, "edm": edm}
