"""Implements the commands of `selm` that need more than a single call."""
