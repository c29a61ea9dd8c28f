"""A rule that takes its time, so that ranking can be interrupted, and notes whom it was asked about."""

import time
from pathlib import Path


def length(prompt: str, response: str, row: dict) -> float:
    with Path("asked.txt").open("a") as f:  # where the run was started
        print(prompt, file=f)
    time.sleep(0.1)
    return float(len(response))
