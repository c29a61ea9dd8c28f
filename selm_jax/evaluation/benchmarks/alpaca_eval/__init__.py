"""AlpacaEval 2: 805 answers, a judge's annotations of them, and the numbers of the leaderboard."""
