"""A program that needs no PyTorch does not speak of it."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import os, pathlib
from selm_jax.text import tokenizer
try:
    tokenizer._from_older_files(pathlib.Path("nowhere"))
except Exception as error:
    print(type(error).__name__)
assert "transformers" in __import__("sys").modules
"""


def test_transformers_says_nothing_about_pytorch():
    environment = {k: v for k, v in os.environ.items() if "ADVISORY" not in k} | {"USE_TORCH": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert "PyTorch" not in done.stdout + done.stderr
