"""Intervals of means, shares and gains, over prompts and over seeds."""
