"""Confidence intervals for results over prompts and seeds.

intervals    of a mean over prompts and seeds, or of a paired difference: `pooled`, `difference`
crossed      the standard error if both seeds and prompts are drawn at random
proportions  of a share of prompts, also near 0 and 1
multiple     Holm's correction for several tests

All intervals are 95 % intervals, none uses random numbers, and each says to which population it
applies. Win rates at equal length (`evaluation.equal_length`, AlpacaEval's fit) have their own
standard error, from which `proportions` makes their intervals.
"""
