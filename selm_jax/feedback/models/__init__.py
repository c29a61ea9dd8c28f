"""Rankers that are neural networks: PairRM, which compares two answers, and reward models."""
