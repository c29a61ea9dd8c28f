"""Preference examples: on disk, packed into prompt trees, in a deterministic order."""
