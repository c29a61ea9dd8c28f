"""AlpacaEval 2: answers to 805 instructions, a judge's annotations, and win rates."""
