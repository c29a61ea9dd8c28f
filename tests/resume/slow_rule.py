"""A slow rule, so that ranking can be interrupted; it records the prompts it was called with."""

import time
from pathlib import Path


def length(prompt: str, response: str, row: dict) -> float:
    with Path("asked.txt").open("a") as f:  # where the run was started
        print(prompt, file=f)
    time.sleep(0.1)
    return float(len(response))
