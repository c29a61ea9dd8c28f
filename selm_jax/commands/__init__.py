"""Verbs of the command line that are more than one call: preview, figures and the tiny stand-ins."""
