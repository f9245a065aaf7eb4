"""The update rule in float64 scalars, and which parameters share them."""
