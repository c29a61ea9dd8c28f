"""Turns ranked candidates into preference pairs, and pairs into packed batches."""
