"""A run: an experiment at work in its folder."""
