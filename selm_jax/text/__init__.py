"""Reads datasets of prompts (`prompts`) and turns conversations into token ids (`chat`)."""
