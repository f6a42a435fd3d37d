"""The grouped products of a layer, by who computes them."""
