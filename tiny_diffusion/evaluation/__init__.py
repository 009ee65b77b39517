"""How good the samples of a model are: features, distances between sets of features, and the protocol around both."""
