"""Predictions: what the network is trained to output, as two coefficients of the clean image and the noise.

The output is ``a * x_0 + b * noise``.  Together with ``x_t = alpha * x_0 + sigma * noise`` this is one 2x2 system, so
every type has the same target and the same inverse.  All functions take floats, numpy arrays and tensors.
To add a type: a row in PREDICTIONS.
"""

PREDICTIONS = {
    #           (alpha, sigma) -> (a, b)
    "epsilon": lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),  # Ho et al. (2020)
    "x0": lambda alpha, sigma: (1 + 0 * alpha, 0 * alpha),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans & Ho (2022)
    "flow": lambda alpha, sigma: (-1 + 0 * alpha, 1 + 0 * alpha),  # Liu et al. (2022): noise - x_0
}


def target(prediction: str, alpha, sigma, clean, noise):
    """The training target: what the network should output for this clean image and this noise."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    return a * clean + b * noise


def determinant(prediction: str, alpha, sigma):
    """The determinant of the 2x2 system: 0 where the output does not determine the image, as epsilon at alpha = 0."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    return alpha * b - sigma * a


def recover(prediction: str, alpha, sigma, x, output):
    """Estimates of (clean, noise) from the noisy image x and the network's output: the inverse of `target`."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    det = alpha * b - sigma * a
    return (b * x - sigma * output) / det, (alpha * output - a * x) / det
