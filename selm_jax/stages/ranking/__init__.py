"""The parts of `rank`: candidates, the budget, people, ranking, and teaching where nothing is ranked."""
