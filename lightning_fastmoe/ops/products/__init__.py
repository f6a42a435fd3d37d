"""The grouped GEMMs of a layer, one module per implementation."""
