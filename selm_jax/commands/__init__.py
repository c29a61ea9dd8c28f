"""Implements the longer commands of `selm`, such as `preview`, `redo` and `show`."""
