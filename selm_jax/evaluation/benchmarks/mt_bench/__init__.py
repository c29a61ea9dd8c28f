"""MT-Bench: 80 questions of two turns, a judge's grades of the answers, and their means."""
