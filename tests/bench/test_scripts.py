"""The scripts of benchmarks/: what they count, and a rehearsal of the one for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selm_jax.models.config import DecoderConfig, LayerKind, Rope

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = DecoderConfig(
    96, 32, 4, 2, 8, 64, (LayerKind(Rope(1e4)),) * 2, 1e-5, False, 2048, "LlamaForCausalLM"
)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The scripts import each other by the names that they have when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.syspath_prepend(BENCHMARKS / "device")
        yield


def example(prompt: int, *responses: int) -> dict:
    return {"prompt": [1] * prompt, "responses": [[1] * r for r in responses]}


def operations(tokens: int, pairs: int, scored: int) -> float:
    """By hand: 2 layers of 32 x (32 + 32 + 16 + 16) and 3 x 32 x 64, 4 heads of 8, 96 words."""
    weights = 2 * (32 * 96 + 3 * 32 * 64)
    return 1e-9 * (2 * tokens * weights + 4 * pairs * 2 * 32 + 2 * scored * 32 * 96)


@pytest.mark.parametrize(
    ("key", "passes", "tokens", "pairs", "scored"),
    [
        # A tree of 2 + (3, 1, 1), whose tokens see 1, 2; 3, 4, 5; 3; 3 keys.
        ("selm", 3, 7, 21, 5),
        ("selm_dpo", 3, 6, 18, 4),
        ("selm_shared", 3, 6, 18, 4),  # the first example of a step has two distinct responses
        # Texts of 2 + 3, 2 + 1 and 2 + 1 tokens.
        ("authors", 4, 11, 15 + 6 + 6, 5),
        ("trl_cached", 3, 8, 15 + 6, 4),
        ("trl_live", 4, 8, 15 + 6, 4),
        ("tunix_none", 3, 8, 15 + 6, 4),
    ],
)
def test_a_contestants_operations_are_those_counted_by_hand(key, passes, tokens, pairs, scored):
    from versus import work

    data = {"train": [[example(2, 3, 1, 1)]]}
    found = work.gflop(key, TINY, data, 0)
    assert found == pytest.approx(passes * operations(tokens, pairs, scored))


def test_an_answers_operations_are_those_counted_by_hand():
    from versus import work

    data = {"settings": {"prompt": 3, "response": 4}}
    found = work.gflop("engine", TINY, data, 5)
    # The last of 7 tokens is drawn and never read; 4 of the others have their logits computed.
    assert found == pytest.approx(5 * operations(6, 1 + 2 + 3 + 4 + 5 + 6, 4))


def test_realistic_lengths_are_drawn_alike_and_within_their_bounds():
    from versus.data import realistic

    found = realistic(200, 0)
    assert found == realistic(200, 0) != realistic(200, 1)
    assert all(16 <= each.prompt <= 512 for each in found)
    assert all(100 <= length <= 1000 for each in found for length in each.responses)
    assert 300 < sum(sum(each.responses) for each in found) / 600 < 400


@pytest.mark.parametrize(("last", "quiet"), [(114.0, True), (116.0, False)])
def test_a_run_is_called_not_quiet_by_its_matmul_rates(last, quiet):
    from versus.contestants import TRAINING
    from versus.process import Measured
    from versus.tables import Result, noise

    steps = [{"gflops": [90.0, 110.0]}, {"gflops": [last, last]}]
    said = noise([Result(TRAINING[0], {"selm": Measured({}, steps)}, {"selm": 1.0})])
    assert said.startswith("Quiet") == quiet


def test_ratios_at_equal_matmul_rates_take_each_sides_own_rate():
    from versus.contestants import TRAINING
    from versus.process import Measured
    from versus.tables import Result, judge

    def steps(seconds, rate):
        return Measured({}, [{"seconds": seconds, "gflops": [rate, rate], "peak_mib": 1.0}] * 2)

    found = {"selm": steps(1.0, 300.0), "authors": steps(4.0, 100.0)}
    verdict = next(v for v in judge(Result(TRAINING[0], found, {})) if v.ratio is not None)
    assert verdict.ratio == 4.0 and verdict.even == pytest.approx(4 / 3)


def test_the_table_of_a_device_has_what_there_is(tmp_path):
    import table

    facts = {
        "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 64, "num_hidden_layers": 2,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip
    device = {"kind": "X", "platform": "gpu", "peak_tflops": 1e-6, "bandwidth_gb": None}
    work = {"device": device, "shapes": {"tiny": facts}, "examples": {"128": [[2, 3, 1, 1]]}}
    (tmp_path / "work.json").write_text(json.dumps(work))
    head = {"what": "train", "shape": "tiny", "row_length": 128}
    lines = [
        head | {"by": "selm_jax", "error": "RESOURCE_EXHAUSTED"},
        head | {"by": "TRL DPO", "seconds": [2.0, 1.0, 4.0]},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    table.main(str(tmp_path), "ended", "TRL tiny", "124", "40", "40")
    page = (tmp_path / "table.md").read_text()
    assert "| tiny | 128 | selm_jax | RESOURCE_EXHAUSTED |" in page
    share = 1e9 * 3 * operations(8, 21, 4) / 2.0 / 1e6
    assert f"| tiny | 128 | TRL DPO | 0.5 | 4 | {share:.0%} | 2 |" in page
    assert "| TRL tiny | reached its time limit | 40 of 40 |" in page


@pytest.mark.slow
def test_the_script_for_gpus_can_be_rehearsed(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": ""}
    # Eight devices would be the tests' own; a GPU is one.
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "device.sh"), "--rehearse", str(tmp_path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    page = (tmp_path / "table.md").read_text()
    assert "A rehearsal on CPU" in page
    for row in ("| tiny | 128 | selm_jax |", "| tiny | 256 | selm_jax |", "| tiny | 104 | 8 |"):
        assert row in page, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    parts = {line.split(" | ")[0][2:]: line for line in page.splitlines() if " of " in line}
    for name in ("prepare", "train tiny", "decode", "tests"):
        assert "| ended |" in parts[name], (tmp_path / "log.txt").read_text()[-3000:]
    assert "ended" in parts["TRL tiny"] or "left out" in parts["TRL tiny"]
