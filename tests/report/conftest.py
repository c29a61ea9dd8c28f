"""Makes synthetic run folders that follow the run-folder contract."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WORDS = [
    "the",
    "river",
    "moves",
    "slowly",
    "past",
    "old",
    "stone",
    "houses",
    "while",
    "children",
    "watch",
    "small",
    "boats",
    "drift",
    "under",
    "a",
    "wide",
    "bridge",
    "and",
    "somebody",
    "sings",
    "about",
    "summer",
    "rain",
    "falling",
    "on",
    "quiet",
    "gardens",
    "where",
    "bread",
    "is",
    "warm",
    "light",
    "returns",
    "each",
    "morning",
    "people",
    "remember",
    "stories",
    "that",
    "travel",
    "between",
    "distant",
    "villages",
]

ALL = ("generate", "rank", "score", "train", "export", "evaluate")


def make_run(
    folder: Path,
    *,
    name: str = "quickstart",
    iterations: int = 3,
    planned: int = 3,
    last_stages: tuple[str, ...] = ALL,
    prompts: int = 12,
    updates: int = 30,
    words: int = 30,
    seed: int = 0,
    gain: float = 0.1,
    repeat: bool = False,
    settings: str = "",
    texts: dict[str, str] | None = None,
) -> Path:
    """A run whose greedy reward grows by `gain` per iteration from 0.3. The last iteration has
    only `last_stages`. `repeat` makes trained answers collapse. `texts` replaces the prompt
    ("prompt") or answer ("answer") of prompt 0."""
    rng = random.Random(seed)
    texts = texts or {}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: {json.dumps(name)}\niterations: {planned}\nseed: {seed}\n"
        f"objective:\n  loss: selm\n  alpha: 0.001\n  beta: 0.01\n{settings}"
    )
    manifest = {
        "name": name,
        "method": "selm",
        "versions": {"selm_jax": "0.1.0", "jax": "0.10.2"},
        "model": {"family": "llama", "parameters": 134_515_008},
        "device": "cpu",
        "created": "2026-01-01T00:00:00Z",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines: list[dict] = []
    for k in range(iterations + 1):
        done = ("evaluate",) if k == 0 else last_stages if k == iterations else ALL
        place = folder / f"iteration_{k}"
        place.mkdir()
        stages = {stage: STAGE[stage](rng, prompts, updates) for stage in done}
        (place / "stage.json").write_text(json.dumps(stages))
        if "train" in done and k:
            lines += [_update(rng, k, step, updates) for step in range(1, updates + 1)]
        if "evaluate" in done:
            lines.append(_evaluation(k, gain, prompts))
            rows = _answers(rng, k, gain, prompts, words, repeat, texts)
            pq.write_table(pa.Table.from_pylist(rows), place / "heldout.parquet")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


STAGE: dict[str, Callable[[random.Random, int, int], dict]] = {
    "generate": lambda rng, n, u: {
        "settings": {"temperature": 1.0},
        "counts": {"prompts": 8 * n, "responses": 24 * n, "tokens": 2000 * n},
        "seconds": 60 + 10 * rng.random(),
    },
    "rank": lambda rng, n, u: {
        "counts": {
            "pairs": 6 * n,
            "explore/best": 2 * n,
            "explore/middle": 3 * n,
            "explore/worst": n,
            "explore/tied": 0,
            "explore_is/chosen": 2 * n,
            "drops/tie": n,
            "drops/equal_text": n // 2,
            "drops/cut_off": 0,
            "length/chosen": 40.0,
            "length/chosen_p10": 12.0,
            "length/chosen_p90": 77.0,
            "length/slope": 0.3,
            "length/slope_stderr": 0.1,
        },
        "seconds": 8 + rng.random(),
    },
    "score": lambda rng, n, u: {"counts": {"responses": 18 * n}, "seconds": 12 + rng.random()},
    "train": lambda rng, n, u: {
        "counts": {
            "updates": u,
            "examples": 6 * n,
            "left_over": 3,
            "tokens_useful": 900 * n,
            "tokens_padded": n,
        },
        "seconds": 90 + 10 * rng.random(),
    },
    "export": lambda rng, n, u: {"counts": {"bytes": 269_000_000}, "seconds": 3.5},
    "evaluate": lambda rng, n, u: {
        "counts": {"responses": 2 * n, "heldout/kl": 1.5},
        "seconds": 20 + rng.random(),
    },
}


def _update(rng: random.Random, k: int, step: int, updates: int) -> dict:
    t = step / updates
    noise = lambda scale: rng.gauss(0, scale)
    chosen, rejected, explore = 0.2 * t, -0.5 * t, -0.25 * t
    return {
        "stage": "train",
        "iteration": k,
        "step": step,
        "loss": 0.69 - 0.25 * t + noise(0.03),
        "loss/dpo": 0.69 - 0.25 * t + noise(0.03),
        "loss/optimism": -0.00025 * t + noise(0.00002),
        "rewards/chosen": chosen + noise(0.05),
        "rewards/rejected": rejected + noise(0.05),
        "rewards/margins": chosen - rejected + noise(0.05),
        "rewards/accuracies": min(1.0, 0.5 + 0.4 * t + abs(noise(0.03))),
        "optimism/reward": explore + noise(0.05),
        "logps/chosen": -120 - 10 * t + noise(4),
        "learning_rate": 5e-7 * (1 - t),
        "grad_norm": 3 + abs(noise(0.6)),
        "time/seconds": 3.0,
        "time/tokens_per_second": 300 + noise(10) - 200 * (step == 1),
    }


def _evaluation(k: int, gain: float, prompts: int) -> dict:
    greedy = 0.3 + gain * k
    line = {
        "stage": "evaluate",
        "iteration": k,
        "heldout/reward_greedy": greedy,
        "heldout/reward_greedy_low": greedy - 0.12,
        "heldout/reward_greedy_high": greedy + 0.11,
        "heldout/reward_sample": greedy - 0.05,
        "heldout/reward_sample_low": greedy - 0.15,
        "heldout/reward_sample_high": greedy + 0.07,
        "heldout/kl": 4.0 * k,
        "heldout/kl_stderr": 0.3 * k,
        "heldout/length": 40.0 + k,
        "heldout/cut_off": 0.05,
        "heldout/prompts": prompts,
    }
    if k:
        line |= {
            "heldout/gain": gain * k,
            "heldout/gain_low": gain * k - 0.08,
            "heldout/gain_high": gain * k + 0.09,
        }
    return line


def _answers(
    rng: random.Random,
    k: int,
    gain: float,
    prompts: int,
    words: int,
    repeat: bool,
    texts: dict[str, str],
) -> list[dict]:
    rows = []
    for i in range(prompts):
        prompt = f"Say something kind about number {i}."
        if i == 0:
            prompt = texts.get("prompt", prompt)
        for kind in ("greedy", "sample"):
            some = [rng.choice(WORDS) for _ in range(words + rng.randrange(max(words // 2, 1)))]
            text = " ".join(["great"] * words * 2 if repeat and k else some)
            rows.append(
                {
                    "prompt_id": f"p{i:03d}",
                    "prompt": prompt,
                    "kind": kind,
                    "sample": int(kind == "sample"),
                    "text": texts["answer"] if i == 0 and "answer" in texts else text,
                    "token_ids": [1, 2],
                    "finish": "length" if (repeat and k) or rng.random() < 0.05 else "stop",
                    "score": 0.3 + gain * k + rng.gauss(0, 0.2),
                    "logp": -90.0,
                    "logp_start": -90.0 - 4 * k,
                }
            )
    return rows


@pytest.fixture(scope="session", name="make_run")
def _make_run() -> Callable[..., Path]:
    return make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of three iterations."""
    return make_run(tmp_path / "run")
