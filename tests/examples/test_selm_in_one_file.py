"""The example does what it says: the loss begins at log 2, answers get better, and it is short."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "selm_in_one_file.py"


def test_three_iterations_make_the_answers_better(capsys):
    spec = importlib.util.spec_from_file_location("selm_in_one_file", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rewards = example.main()
    assert len(rewards) == 4
    assert all(after > before for before, after in itertools.pairwise(rewards)), rewards
    assert rewards[-1] > 2 * rewards[0], rewards
    printed = capsys.readouterr().out
    firsts = [float(loss) for loss in re.findall(r"update 1  loss +([\d.]+)", printed)]
    assert firsts == pytest.approx([math.log(2)] * 3, abs=1e-3), (
        "each iteration's reference is the policy that it starts from"
    )


def test_it_can_be_read_in_ten_minutes():
    assert FILE.read_text().count("\n") < 170
