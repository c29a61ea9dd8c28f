"""Runs established benchmarks: AlpacaEval 2, MT-Bench and the tasks of lm-eval."""
