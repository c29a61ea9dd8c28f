"""Implements the verbs of the command line that need more than a single call."""
