"""Communication that starts while backward still computes."""
