"""Training: the loop, the averaged weights, the optimisers."""
