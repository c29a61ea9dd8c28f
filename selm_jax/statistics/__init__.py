"""Intervals: what numbers over prompts and seeds say about others. One number has one interval.

intervals    a mean over prompts and seeds, or a paired difference of two: `pooled`, `difference`
crossed      its standard error over seeds and prompts that are both drawn at random
proportions  a share of prompts, near 0 and 1 too
multiple     Holm's correction where several differences are tested at once

All intervals are 95 % intervals, none draws random numbers, and each says what it is about. Rates at
equal length (`evaluation.equal_length`, AlpacaEval's fit) bring their own standard error, and make
their intervals of it with `proportions`.
"""
