"""Verdicts, tables and the plot, made from results."""
