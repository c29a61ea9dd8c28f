"""Rankers that are models: PairRM, which reads two answers side by side, and reward models."""
