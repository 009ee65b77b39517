"""How good the images of a model are: features, distances between sets of them, and the protocol around both."""
