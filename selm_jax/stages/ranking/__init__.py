"""The parts of `rank`: candidates, the budget, people, pairs, and pairs taken from the data."""
