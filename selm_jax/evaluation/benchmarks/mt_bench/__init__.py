"""The MT-Bench benchmark: 80 questions of two turns, whose answers a judge grades."""
