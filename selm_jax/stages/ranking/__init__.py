"""The parts of the stage `rank`: candidates, the budget, people, pairs, and the data's pairs."""
