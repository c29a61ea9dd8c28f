"""`selm plan`: what is planned is what runs, its numbers are those one gets by hand, and what it
proposes was tried."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairrm
from rich.console import Console
from tiny import counts_of, do, experiment, make_model
from typer.testing import CliRunner

from selm_jax import cli, config
from selm_jax.models import deberta, flops
from selm_jax.models.decoder import abstract_params
from selm_jax.parallel.rules import place_rows
from selm_jax.plan import command, examine, topology, work
from selm_jax.plan.measure import measure, wanted
from selm_jax.plan.phases import Blueprint, phases
from selm_jax.plan.remedies import remedy
from selm_jax.plan.topology import GIB, Target, TopologyError, local_target, target
from selm_jax.policy.sizes import least
from selm_jax.rollout import schedule
from selm_jax.rollout import slots as rollout
from selm_jax.run.run import Run
from selm_jax.shell.memory import shard_bytes
from selm_jax.training.state import TrainState
from selm_jax.weights import facts
from selm_jax.weights.deberta import LARGE
from selm_jax.weights.sources import SourceError

ROOT = Path(__file__).parents[2]
PAPER = {
    "zephyr_7b": "mistral-7b-sft-beta",
    "llama3_8b": "Meta-Llama-3-8B-Instruct",
    "phi3_mini": "Phi-3-mini-4k-instruct",
}
ULTRAFEEDBACK = 61_135


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, its data and an experiment on 4 x 2 devices, `experiment.yaml`."""
    folder = tmp_path_factory.mktemp("plan")
    experiment(folder, compute__fsdp=4, compute__tensor=2)
    return folder


@pytest.fixture(autouse=True, scope="module")
def own_cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELM_CACHE", str(folder / "cache"))
        yield


@pytest.fixture
def tiny_one(folder):
    """load(changes), and the facts of the tiny model."""
    read = command.read_facts(folder / "model" / "config.json")
    return lambda change=(): config.load(folder / "experiment.yaml", change), read


def paper(name: str, *overrides: str):
    """An experiment of the paper, with the sizes that the numbers here were worked out for."""
    sizes = ("rollout.slots=64", "rollout.prefill_rows=8", "training.rows=32")
    remat = ("training.remat=full", "training.logprob_chunk=32")
    file = ROOT / f"experiments/paper/{name}/selm.yaml"
    e = config.load(file, [*sizes, *remat, *overrides])
    return e, command.read_facts(ROOT / f"tests/golden/published/{PAPER[name]}/config.json")


def here(hbm: float = 1.0, **changes) -> Target:
    return dataclasses.replace(local_target(hbm), **changes)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def of(options: Sequence = (), **given) -> examine.Options:
    return examine.Options(*options, **given)


# What is planned is what runs


def test_the_programs_are_given_what_the_run_gives_them(tiny_one):
    load, read = tiny_one
    where = here()
    e = load([f"rollout.max_prompt_tokens={Run(load()).data.longest_prompt}"])
    run, b = Run(e, Console(quiet=True)), Blueprint(e, read, where)
    assert b.devices.mesh == run.devices.mesh and dict(b.devices.mesh.shape) == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
    }
    assert (b.programs.config, b.devices.dtype) == (run.programs.config, run.devices.dtype)
    assert dataclasses.replace(b.programs.engine, stop_ids=run.chat.stop_ids) == run.programs.engine
    check = jax.tree_util.tree_map_with_path

    def same(path, planned, real):
        assert planned.shape == real.shape and planned.dtype == real.dtype, path
        assert planned.sharding.is_equivalent_to(real.sharding, real.ndim), path

    params = run.programs.load(run.policy(0).path)
    check(same, b.programs.abstract_params, params)
    check(same, b.abstract_state, TrainState.create(params, run.programs.optimizer))
    decoding = run.programs.decoding(params)
    check(same, b.decoding_params, decoding)
    engine = run.programs.engine
    largest = schedule.bucket(engine.max_prompt) + engine.max_new_tokens
    check(same, b.generation.slots, rollout.empty(engine, largest))
    _, (engine, _, tokens, lengths) = b.generation.prefill
    prefilled = rollout.prefill(
        engine, decoding, np.zeros(tokens.shape, np.int32), np.ones(lengths.shape, np.int32)
    )
    check(same, b.generation.prefilled, prefilled)
    batch = run.programs.place(rollout_batch(b))
    check(same, b.abstract_batch, batch)
    gradients, sums = run.programs.update.gradients(params, batch, np.ones(3, np.float32))
    names = {phase.name: phase for phase in phases(b, 2)}
    planned = names["gradients, add"].arguments
    check(same, planned[:2], (gradients, sums))


def rollout_batch(b: Blueprint):
    from selm_jax.preferences.packing import empty

    return empty(b.batch_shape)


def test_arguments_are_the_shards_of_the_abstract_trees(tiny_one):
    load, read = tiny_one
    where = here()
    b = Blueprint(load(), read, where)
    seen = set()
    for phase in phases(b, 2):
        memory = measure(phase.lower(), where)
        leaves = [x for x in jax.tree.leaves(phase.arguments) if hasattr(x, "dtype")]
        # What comes from the host lies as the compiler likes; and what a program does not look at,
        # such as roles or mean lengths, is not passed to it; segments and branches neither: what is
        # packed says in `end` who sees whom.
        free = shard_bytes([x for x in leaves if x.sharding is None])
        if phase.name in ("score", "gradients, add"):
            free += shard_bytes([b.abstract_batch.segment, b.abstract_batch.branch])
        less = shard_bytes(leaves) - memory.arguments
        assert 0 <= less <= free + 0.04 * memory.arguments, phase.name
        seen.add(phase.name)
    assert seen == {"prefill", "refill", "decode", "score", "gradients, add", "apply"}


def test_what_lies_beside_a_program_is_counted(tiny_one):
    load, read = tiny_one
    b = Blueprint(load(), read, here())
    held = {phase.name: phase.held for phase in phases(b, 1)}
    one = shard_bytes(b.programs.abstract_params)
    assert held["gradients"] == {"moments": 2 * one + 4}  # Adam's two trees and its count
    assert held["decode"]["policy"] == one  # `evaluate` generates and keeps them
    assert held["prefill"]["slots"] == shard_bytes(b.generation.slots)
    live = Blueprint(load(["training.reference=live"]), read, here())
    assert {p.name: p.held for p in phases(live, 1)}["apply"] == {"reference": one}
    lora = Blueprint(load(["lora={rank: 2, alpha: 4}"]), read, here())
    assert {p.name: p.held for p in phases(lora, 1)}["apply"] == {"base": one}
    silent = Blueprint(load(["data.heldout=null"]), read, here())
    assert "policy" not in {p.name: p.held for p in phases(silent, 1)}["decode"]


def test_a_mixture_of_two_policies_holds_and_reads_two_models(tiny_one):
    load, read = tiny_one
    plain = Blueprint(load(), read, here())
    mixed = Blueprint(load(["rollout.mixture={kind: nash, weight: 0.3}"]), read, here())
    params = shard_bytes(plain.decoding_params)
    for tree in (lambda b: b.decoding_params, lambda b: b.generation.slots.cache):
        assert shard_bytes(tree(mixed)) == 2 * shard_bytes(tree(plain)) > 0
    held = {phase.name: phase.held for phase in phases(mixed, 1)}
    assert held["refill"]["weights"] == 2 * params
    compiled = [
        measure(next(p for p in phases(b, 1) if p.name == "decode").lower(), here())
        for b in (plain, mixed)
    ]
    assert compiled[1].arguments - compiled[0].arguments > params


def test_weights_of_eight_bits_take_a_quarter_and_are_the_runs_own(tiny_one):
    load, read = tiny_one
    pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")
    e = load(["rollout.weights=int8"])
    full, int8 = (Blueprint(each, read, here()).decoding_params for each in (load(), e))
    layers = [sum(shard_bytes(p[f"layer_{i}"]) for i in range(2)) for p in (full, int8)]
    assert 0.25 < layers[1] / layers[0] < 0.45  # of narrow matrices the scales are not nothing
    assert shard_bytes(int8["embedding"]) == shard_bytes(full["embedding"])
    run = Run(e, quiet())
    decoding = run.programs.decoding(run.programs.load(run.policy(0).path))

    def same(planned, real):
        assert (planned.shape, planned.dtype) == (real.shape, real.dtype)
        assert planned.sharding.is_equivalent_to(real.sharding, real.ndim)

    jax.tree.map(same, int8, decoding)


@pytest.mark.slow
def test_pairrm_stays_in_memory_and_is_ranked_with():
    e, read = paper("llama3_8b", "compute.decode_tensor=2", "training.rows=8")
    b = Blueprint(e, read, here())
    (ranker,) = b.model_rankers
    d, m = 1024, 4096
    layer = 4 * (d * d + d) + 2 * d * m + m + d + 4 * d
    encoder = 128_005 * d + 2 * d + 512 * d + 2 * d + 24 * layer
    head = 2 * d * d + d + d + 1
    sizes = [x.size for x in jax.tree.leaves(ranker.params)]
    assert sum(sizes) == encoder + head
    assert b.ranker_bytes == {"PairRM": 4 * (encoder + head)}  # float32 on CPU, all on each device
    by_name = {phase.name: phase for phase in phases(b, 2)}
    tokens = by_name["rank"].arguments[1]
    assert tokens.shape == (8, 2048)  # 1,224 + 2 x 412 tokens; one such pair on each CPU device
    assert all("PairRM" in phase.held for n, phase in by_name.items() if n != "rank")


@pytest.mark.slow
def test_all_models_of_a_mixture_are_planned_for(tmp_path):
    """A reward model reads beside PairRM, which stays; both take their time."""
    head = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    tiny = json.loads((make_model(tmp_path / "language") / "config.json").read_text())
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/config.json").write_text(json.dumps(tiny | head | {"pad_token_id": 0}))
    reward = {"ranker": "reward_model", "settings": {"source": str(tmp_path / "reward")}}
    pairrm = {"ranker": "pairrm", "settings": {}}

    def planned(*parts):
        override = f"feedback={json.dumps({'ranker': 'mixture', 'settings': {'parts': parts}})}"
        e, read = paper("llama3_8b", "compute.decode_tensor=2", "training.rows=8", override)
        b = Blueprint(e, read, here(peak=1e12, bandwidth=1e9))
        ranks = {p.name: p.held for p in phases(b, 2) if p.name.startswith("rank")}
        of_rank = [p for p in rows_of(b) if p.name == "rank"]
        return ranks, sum(p.hours for p in of_rank), sum(p.tokens for p in of_rank)

    both, hours, tokens = planned(pairrm, reward)
    assert list(both) == ["rank: PairRM", "rank: reward model"]
    assert "PairRM" in both["rank: reward model"] and "PairRM" not in both["rank: PairRM"]
    twice, _, _ = planned(pairrm, {"ranker": "mixture", "settings": {"parts": [pairrm]}})
    assert twice["rank: PairRM 1"].keys() == {"PairRM 2", "policy"}
    alone = [planned(each) for each in (pairrm, reward)]
    assert [list(ranks) for ranks, _, _ in alone] == [["rank"], ["rank"]]
    assert hours == pytest.approx(sum(h for _, h, _ in alone))
    assert tokens == sum(n for _, _, n in alone)


def test_a_warm_starts_held_out_answers_are_ranked():
    e = config.load(ROOT / "experiments/paper/zephyr_7b/warm_start.yaml", ["training.rows=8"])
    _, read = paper("zephyr_7b")
    by_name = {p.name: p.held for p in phases(Blueprint(e, read, here()), 2)}
    assert "rank" in by_name
    assert all("PairRM" in held for name, held in by_name.items() if name != "rank")


def test_answers_of_a_server_are_not_counted():
    e, read = paper("llama3_8b", "rollout.remote={engine: vllm}", "data.heldout=null")
    b = Blueprint(e, read, here())
    assert not any(p.name in ("prefill", "refill", "decode") for p in phases(b, 2))
    assert not any(p.name.startswith("generate") for p in rows_of(b))
    said = work.lengths_of(b, 61135, 2000, None, None).assumed
    assert any(
        "rollout.remote generates the candidates; its time is not counted" in each for each in said
    )


def test_tasks_of_lm_eval_are_not_counted_and_that_is_said():
    e, read = paper("llama3_8b", "evaluation.tasks=[arc_easy, hellaswag:10]")
    said = work.lengths_of(Blueprint(e, read, here()), 61135, 2000, 200, 300).assumed
    assert any("--tasks arc_easy,hellaswag:10 --dry-run` counts" in each for each in said)


def rows_of(b: Blueprint):
    w = work.work_of(b, work.lengths_of(b, 61135, 2000, None, None), work.Assumed(0.4, 0.6))
    assert w is not None
    return w.parts


# Numbers by hand


@pytest.mark.parametrize(
    "name, prompts, updates", [("zephyr_7b", 15_283, 59), ("llama3_8b", 20_378, 159)]
)
def test_updates_of_the_paper(name, prompts, updates):
    e, read = paper(name, "training.rows=32", "training.row_length=3200")
    b = Blueprint(e, read, here(peak=1e12, bandwidth=1e9))
    lengths = work.lengths_of(b, ULTRAFEEDBACK, 2000, 200, 300)
    assert (lengths.prompts, lengths.heldout, lengths.assumed) == (prompts, 2000, ())
    w = work.work_of(b, lengths, work.Assumed(0.4, 0.6))
    assert w is not None and w.updates == updates
    # An example: 200 + 3 x 300 tokens, two in a row of 3,200.
    assert w.batches == -(-e.training.global_batch // (2 * 32))
    assert w.useful == updates * e.training.global_batch * 1100


def test_rows_of_any_length_are_planned_for_at_their_longest_and_counted_at_their_mean():
    e, read = paper("llama3_8b")
    b = Blueprint(e, read, here(peak=1e12, bandwidth=1e9))
    # Three answers, each with its prompt at most 1,024 tokens; rows of one to two such examples.
    assert b.longest_example == 3072 and (b.batch_shape.rows, b.batch_shape.time) == (32, 6144)
    lengths = work.lengths_of(b, ULTRAFEEDBACK, 2000, 200, 300)
    assert any("rows of 6,144 tokens" in each for each in lengths.assumed)
    # 128 examples of 200 + 3 x 300 tokens fill 32 rows of four: one batch.
    assert work.packed(b, lengths) == work.Packed(rows=32, time=4480, batches=1, per_row=4)
    w = work.work_of(b, lengths, work.Assumed(0.4, 0.6))
    assert w is not None and (w.rows, w.row_length) == (32, 4480)
    assert w.useful / w.padded == pytest.approx(128 * 1100 / (32 * 4480))
    fixed = Blueprint(paper("llama3_8b", "training.row_length=3200")[0], read, b.target)
    assert fixed.batch_shape.time == 3200 and work.packed(fixed, lengths).time == 3200


def test_arithmetic_and_hours_by_hand():
    e, read = paper("llama3_8b", "training.row_length=3200")
    b = Blueprint(e, read, here(peak=2e12, bandwidth=1e9))
    w = work.work_of(b, work.lengths_of(b, 300, 0, 200, 300), work.Assumed(mfu=0.5, mbu=0.25))
    assert w is not None
    parts = {part.name: part for part in w.parts}
    assert [*parts] == ["generate: prefill", "generate: decode", "rank", "score"] + ["train"]
    weights = 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    vocab, heads = 4096 * 128_256, 32 * 128
    # 100 prompts of 200 tokens, padded to 256; one token of each meets the unembedding.
    prefill = 2 * 100 * 256 * weights + 4 * 100 * 256 * 256 * 32 * heads + 2 * 100 * vocab
    assert parts["generate: prefill"].flop == prefill
    assert parts["generate: prefill"].hours == pytest.approx(prefill / (8 * 2e12 * 0.5) / 3600)
    capacity = 7168 + 1024
    tokens = 100 * 300
    decode = 2 * tokens * (weights + vocab) + 4 * tokens * capacity * 32 * heads
    assert parts["generate: decode"].flop == decode
    # Steps of 64 slots (of 100 answers: two rounds), each reading a copy's weights and caches.
    copies = 8 // (e.compute.decode_tensor or 1)
    read_bytes = 4 * (weights + 2 * vocab + 65 * 4096) / (8 // copies)
    read_bytes += 64 // copies * capacity * 2 * 8 * 128 * 32 * 4 / (8 // copies)
    by_memory = 2 * 300 * read_bytes / (1e9 * 0.25) / 3600
    assert parts["generate: decode"].hours == pytest.approx(by_memory, rel=0.01)
    # Three candidates: 6 ordered pairs of 200 + 2 x 300 tokens.
    d, time = 1024, 800
    layers = 24 * (4 * d * d + 2 * d * 4096 + 6 * time * d)
    assert parts["rank"].flop == 600 * 2 * time * layers
    # 50 rows of two examples are padded to two batches; 1,800 scored tokens to 5/8 of a row.
    rows, scored = 64, 2000
    forward = 2 * rows * 3200 * weights + 4 * rows * 3200 * 3200 * 32 * heads
    assert parts["score"].flop == forward + 2 * rows * scored * vocab
    assert w.updates == 0 and parts["train"].flop == 0  # 100 prompts are no global batch


# Of all layers: the numbers that multiply a token, and the width of the heads. The parameters that
# are read for a token are as published: 3.6 and 30.7 billion, the latter all.
GPT_OSS = 24 * (2880 * (2 * 4096 + 2 * 512) + 2880 * 32 + 4 * 3 * 2880 * 2880), 24 * 64 * 64
GEMMA_4 = (
    5376 * (50 * (2 * 8192 + 2 * 4096) + 10 * (2 * 16_384 + 2048) + 60 * 3 * 21_504),
    32 * (50 * 256 + 10 * 512),
)


@pytest.mark.parametrize(
    ("name", "numbers", "vocab", "read", "total"),
    [
        ("openai--gpt-oss-20b", GPT_OSS, 2880 * 201_088, 3.61e9, 20_914_757_184),
        ("google--gemma-4-31B-it", GEMMA_4, 5376 * 262_144, 30.7e9, 30_697_345_340),
    ],
    ids=["gpt-oss-20b", "gemma-4-31B"],
)
def test_models_whose_layers_differ_are_planned_by_hand(name, numbers, vocab, read, total):
    weights, heads = numbers
    assert weights + vocab == pytest.approx(read, rel=2e-3)
    e, _ = paper("llama3_8b", "training.row_length=3200")
    facts = command.read_facts(ROOT / f"tests/golden/configs/{name}.json")
    b = Blueprint(e, facts, here())  # without a rate, nothing is traced for hours
    w = work.work_of(b, work.lengths_of(b, 300, 0, 200, 300), work.Assumed(mfu=0.5, mbu=0.25))
    assert w is not None
    parts = {part.name: part.flop for part in w.parts}
    # The lengths, rows and slots are those of `test_arithmetic_and_hours_by_hand`.
    prefill = 2 * 100 * 256 * weights + 4 * 100 * 256 * 256 * heads + 2 * 100 * vocab
    assert parts["generate: prefill"] == prefill
    decode = 2 * 100 * 300 * (weights + vocab) + 4 * 100 * 300 * 8192 * heads
    assert parts["generate: decode"] == decode
    forward = 2 * 64 * 3200 * weights + 4 * 64 * 3200 * 3200 * heads
    assert parts["score"] == forward + 2 * 64 * 2000 * vocab
    # A device of eight has an eighth of the parameters, but all of the norms and biases.
    assert 1 <= shard_bytes(b.programs.abstract_params) / (4 * total / 8) <= 1.002


def test_a_second_reference_scores_again_but_not_in_the_first_iteration():
    """With INPO the start model scores beside the policy before, unless they are one model."""
    read = paper("llama3_8b")[1]

    def planned(*overrides: str) -> work.Work:
        b = Blueprint(paper("llama3_8b", *overrides)[0], read, here(peak=2e12, bandwidth=1e9))
        w = work.work_of(b, work.lengths_of(b, 300, 0, 200, 300), work.Assumed(0.4, 0.6))
        assert w is not None
        return w

    inpo = "objective={loss: inpo, beta: 0.1}"
    dpo, two = planned("objective={loss: dpo, beta: 0.1}"), planned(inpo)
    score = next(part for part in dpo.parts if part.name == "score")
    assert two.second is not None and score.hours
    assert (two.second.tokens, two.second.flop) == (score.tokens, score.flop) != (0, 0)
    assert two.hours == pytest.approx((dpo.hours or 0) + score.hours)
    run = [w.hours_of_run(3) or 0 for w in (dpo, two)]
    assert run[1] == pytest.approx(run[0] + 2 * score.hours)
    once = planned(inpo, "iterations=1", "data.portions=3", "training.learning_rate=5e-7")
    assert once.second is None and once.parts == dpo.parts


def test_an_evaluation_by_hand():
    e, read = paper("llama3_8b", "training.row_length=3200")
    b = Blueprint(e, read, here(peak=2e12, bandwidth=1e9))

    def tokens(prompt: int, response: int) -> tuple[int, int]:
        """Of an evaluation of 2,000 prompts, and of the start model's."""
        lengths = work.lengths_of(b, 300, 2000, prompt, response)
        assert lengths.pairs == 2000
        w = work.work_of(b, lengths, work.Assumed(0.4, 0.6))
        assert w is not None and w.start is not None and w.parts[-1].name == "evaluate"
        return w.parts[-1].tokens, w.start.tokens

    # A greedy answer and a sample; PairRM reads each beside the start's greedy one, in both orders.
    read_and_drawn = 2000 * (256 + 2 * 300) + 4000 * 2 * (200 + 2 * 300)
    # A prompt and its two answers have 800 tokens, as have 2,000 pairs: four in a row, 32 batches.
    rows = 32 * 32
    assert tokens(200, 300) == (read_and_drawn + 2 * rows * 3200, read_and_drawn + rows * 3200)
    # Two answers to a prompt of 2,000 tokens fit no row together: each has one. Pairs fill one.
    drawn = 2000 * (2048 + 2 * 1024) + 4000 * 2 * 2048
    rows = 32 * 188  # 4,000 and 2,000 rows
    assert tokens(2000, 1024) == (drawn + 2 * rows * 3200, drawn + rows * 3200)


@pytest.mark.slow
def test_an_evaluation_is_counted_as_it_is_done(tmp_path, monkeypatch):
    """Comparisons and packed batches of a tiny run, against its plan's."""
    file = experiment(
        tmp_path, feedback={"ranker": "pairrm", "settings": {"folder": str(tmp_path / "pairrm")}},
        evaluation__samples=2,
    )  # fmt: skip
    tiny_pairrm.make_pairrm(tmp_path / "pairrm")
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    pairs = [row | {"chosen": "Yes.", "rejected": "No!"} for row in rows]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    e = config.load(file, ["training.row_length=64", "rollout.max_new_tokens=4"])
    run = Run(e, Console(quiet=True), devices=jax.devices()[:1])
    scored = []
    monkeypatch.setattr(
        "selm_jax.policy.policy.place_rows",
        lambda batch, **how: scored.append(batch.tokens.size) or place_rows(batch, **how),
    )
    run.open()
    do(run, "evaluate", 0)
    counts = counts_of(run, "evaluate", 0)
    assert (counts["prompts"], counts["responses"], counts["pairs"]) == (8, 24, 8)

    where = dataclasses.replace(here(), devices=jax.devices()[:1], chips=1)
    b = Blueprint(e, command.read_facts(tmp_path / "model" / "config.json"), where)
    lengths = work.lengths_of(b, None, None, 33, 4)
    assert (lengths.heldout, lengths.pairs) == (8, 8)
    w = work.work_of(b, lengths, work.Assumed(0.4, 0.6))
    assert w is not None and w.start is not None
    answered = 8 * schedule.bucket(33) + 24 * 4
    # The start's greedy answers met themselves: PairRM reads equal texts in one order alone.
    compared = (counts["ranker/comparisons"] + 8) * (33 + 2 * 4)
    assert w.start.tokens == answered + compared + sum(scored)
    assert w.parts[-1].tokens == answered + compared + 2 * sum(scored)


def test_a_mixtures_models_are_given_smaller_batches(tmp_path):
    parts = [
        {"ranker": "pairrm", "settings": {"folder": "x", "batch": 4}, "normalise": "rank"},
        {"ranker": "length", "settings": {"target": 80}},
    ]
    file = experiment(tmp_path, feedback={"ranker": "mixture", "settings": {"parts": parts}})
    e = config.load(file)
    seen = []

    def fits(change, stage):
        seen.append(config.load(file, change).feedback.settings["parts"])
        return False

    assert remedy(e, least(e), ["rank"], 1, 64, fits) is None
    batches = [found[0]["settings"]["batch"] for found in seen]
    assert batches[:2] == [2, 1] and set(batches) == {1, 2}
    for found in seen:
        found[0]["settings"]["batch"] = 4
        assert found == parts


def test_the_encoder_is_counted_as_xla_counts_it():
    """One layer and one head: nothing is in a loop whose body XLA would count once for all."""
    c = dataclasses.replace(LARGE, vocab_size=64, embed=128, layers=1, heads=1, mlp=256)
    params = nn.unbox(deberta.abstract_params(c))
    rows, time = 2, 256
    forward = jax.jit(
        lambda p, tokens, lengths: deberta.Deberta(c).apply({"params": p}, tokens, lengths)
    )
    ids = jax.ShapeDtypeStruct((rows, time), jnp.int32)
    lowered = forward.lower(params["encoder"], ids, jax.ShapeDtypeStruct((rows,), jnp.int32))
    found = lowered.compile().cost_analysis()["flops"]
    # XLA also counts norms and softmax, and each distance's key and query once per pass.
    distances = 2 * 2 * (2 * time) * c.embed * c.embed
    assert found == pytest.approx(flops.encoder(c, rows=rows, time=time) + distances, rel=0.06)


def test_lengths_are_the_datas_or_the_settings_bounds(tiny_one):
    load, read = tiny_one
    b = Blueprint(load(), read, here())
    lengths = work.lengths_of(b, None, None, None, None)
    assert (lengths.prompts, lengths.heldout) == (16, 8)  # 32 rows, two iterations
    assert (lengths.prompt, lengths.response) == (64, 12)
    assert ["64" in lengths.assumed[0], "12" in lengths.assumed[1]] == [True, True]
    far = Blueprint(load(["data.train=acme/far", "data.heldout=acme/far"]), read, here())
    lengths = work.lengths_of(far, None, None, 30, 10)
    assert (lengths.prompts, lengths.heldout) == (None, None)
    assert "acme/far is not on this machine" in lengths.assumed[0]
    assert "--data-rows" in lengths.assumed[0]
    assert work.work_of(far, lengths, work.Assumed(0.4, 0.6)) is None


# Fits or not, and what then


# Pairs that are taught as they are: nothing is generated, and little is to be compiled.
TAUGHT = [
    "data={train: acme/pairs, chosen: chosen, rejected: rejected}",
    "candidates={greedy: 0, samples: 0, dataset: true}",
    "objective={loss: dpo, beta: 0.1}",
    "training.row_length=256",
]


@pytest.mark.slow
def test_too_little_memory_and_what_was_found_to_help(tiny_one):
    load, read = tiny_one
    wide = [*TAUGHT, "training.rows=64"]
    needed = [
        max(f.needed or 0 for f in examine.compiled(load(c), read, here(), of(), quiet()).fits)
        for c in (wide, [*wide, "training.rows=16"])
    ]
    hbm = needed[1] / GIB * 1.001
    assert needed[1] < needed[0] / 2
    console = quiet()
    plan = examine.examine(
        lambda change: load([*wide, *change]), read, here(hbm), of(hbm=hbm), console
    )
    assert not plan.fit
    assert plan.change == ("training.rows=16",)  # 32 rows were tried, and are too many
    assert any("training.rows=32" in line and "fits" not in line for line in plan.tried)
    again = examine.compiled(load([*wide, *plan.change]), read, here(hbm), of(), quiet())
    assert again.fit
    assert "tried training.rows=16" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_slots_are_reduced_where_generation_does_not_fit(tiny_one):
    load, read = tiny_one
    many = ["rollout.slots=512", "rollout.max_new_tokens=256", "training.rows=4"]
    roomy = examine.compiled(load(many), read, here(), of(), quiet(), "generate")
    hbm = 0.6 * max(f.needed or 0 for f in roomy.fits) / GIB
    plan = examine.examine(lambda c: load([*many, *c]), read, here(hbm), of(tries=12), quiet())
    failed = {f.stage for f in plan.fits if not f.fits}
    assert failed == {"generate"}
    assert plan.change is not None and plan.change[-1].startswith("rollout.slots=")
    assert examine.compiled(load([*many, *plan.change]), read, here(hbm), of(), quiet()).fit


def test_nothing_helps_where_the_parameters_alone_are_too_much(tiny_one):
    load, read = tiny_one
    plan = examine.examine(lambda c: load([*TAUGHT, *c]), read, here(1e-5), of(tries=1), quiet())
    assert not plan.fit and plan.change is None and len(plan.tried) == 1


def test_a_mesh_that_does_not_fit_is_a_verdict(tiny_one):
    load, read = tiny_one
    console = quiet()
    uneven = lambda change: load(["training.rows=6", *change])
    plan = examine.examine(uneven, read, here(), of(tries=0), console)
    assert not plan.fit and "'rows' of size 6 is not divisible by 4" in str(plan.problem)
    taught = lambda change: load([*TAUGHT, "training.rows=6", *change])
    assert examine.examine(taught, read, here(), of(), console).change == ("training.rows=8",)


def test_the_command_prints_it_and_its_status_says_it(folder, tmp_path):
    file, model = str(folder / "experiment.yaml"), str(folder / "model" / "config.json")
    out = tmp_path / "plan.json"

    def plan(*arguments: str):
        wide = CliRunner(env={"COLUMNS": "160"})
        return wide.invoke(cli.app, ["plan", file, "--config", model, *arguments])

    fine = plan("--json", str(out), "--hbm", "1", "--tries", "0")
    assert fine.exit_code == 0, fine.output
    assert re.search(r"FITS on 8 x cpu \(local\), \d+% to spare", fine.output)
    assert "1.00 GiB for programs on each of 8 devices (--hbm)" in fine.output
    record = json.loads(out.read_text())["plans"][0]
    assert record["fits"] and {p["name"] for p in record["programs"]} >= {"decode", "apply"}
    small = plan("--hbm", "0.00001", "--tries", "0")
    assert small.exit_code == command.DOES_NOT_FIT == 3
    assert "DOES NOT FIT" in small.output and " over" in small.output


def test_hours_and_dollars_are_printed():
    e, read = paper("llama3_8b")
    b = Blueprint(e, read, here(peak=1e15, bandwidth=1e12, chips=8))
    lengths = work.lengths_of(b, ULTRAFEEDBACK, 2000, 200, 300)
    w = work.work_of(b, lengths, work.Assumed(0.4, 0.6))
    assert w is not None and w.hours is not None
    plan = examine.Plan(b.target, e, dict(b.devices.mesh.shape), (), lengths, w)
    console = quiet()
    command.show(plan, of(price=2.0), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    # Three iterations, and before them an evaluation of the start model.
    assert w.start is not None and w.start.hours is not None
    hours = 3 * w.hours + w.start.hours
    assert f"{hours:.1f} hours" in said and f"${hours * 8 * 2:,.0f}" in said


def test_what_is_missing_for_hours_is_named():
    e, read = paper("llama3_8b")
    for given, missing in (
        ({"bandwidth": 1e12}, "no peak arithmetic of"),
        ({"peak": 1e15}, "no memory bandwidth of"),
        ({}, "no peak arithmetic and memory bandwidth of"),
    ):
        b = Blueprint(e, read, here(**given))
        lengths = work.lengths_of(b, ULTRAFEEDBACK, 2000, 200, 300)
        plan = examine.Plan(
            b.target, e, {}, (), lengths, work.work_of(b, lengths, work.Assumed(0.4, 0.6))
        )
        console = quiet()
        command.show(plan, of(price=2.0), console)
        assert missing in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_program_is_compiled_once(tiny_one):
    load, read = tiny_one
    where = here()
    new = load([*TAUGHT, "training.row_length=192"])
    first, again = (
        examine.compiled(new, read, where, of(), quiet(), "score").fits[0] for _ in range(2)
    )
    assert (first.memory.cached, again.memory.cached) == (False, True)
    assert dataclasses.replace(again.memory, cached=False) == first.memory
    changed = load([*TAUGHT, "training.row_length=192", "training.rows=4"])
    other = examine.compiled(changed, read, where, of(), quiet(), "score")
    assert not other.fits[0].memory.cached


@pytest.mark.parametrize(
    "words, size",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temp"
            + "oraries (17.08G) exceeds available HBM (15.75G).", 17.08 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile: Used 25.5G of 15.75G hbm. Exceeded", 25.5 * GIB),
        ("RESOURCE_EXHAUSTED: something else", -1),
    ],
)  # fmt: skip
def test_the_compilers_refusal_is_read(words, size):
    assert wanted(words) == int(size)


# Topologies and configs


@pytest.mark.parametrize("name", ["v5x:4x4", "h100:8", "v5litepod", ""])
def test_an_unknown_generation_lists_the_known_ones(name):
    with pytest.raises(TopologyError) as e:
        target(name)
    for each in topology.GENERATIONS:
        assert f"{each}: " in str(e.value)


@pytest.mark.parametrize("name", ["v5e:3x5", "v5e:2x2x2", "v4:4x4", "v5p"])
def test_an_unknown_shape_lists_those_of_its_generation(name):
    with pytest.raises(TopologyError, match="has the shapes .*2x2"):
        target(name)


@pytest.mark.parametrize(
    "kind, peak, bandwidth, chips",
    [
        ("NVIDIA A100-SXM4-40GB", 312, 1555, 8),
        ("NVIDIA A100-SXM4-80GB", 312, 2039, 8),
        ("NVIDIA A100 80GB PCIe", 312, 1935, 8),
        ("NVIDIA H100 80GB HBM3", 989, 3350, 8),
        ("NVIDIA H100 PCIe", 756, 2000, 8),
        ("NVIDIA H200", 989, 4800, 8),
        ("NVIDIA GH200 480GB", 989, 4000, 8),
        ("TPU v5 lite", 197, 819, 8),
        ("TPU7x", 2307 / 2, 7380 / 2, 4),
        ("TPU v3", 61.5, None, 4),
    ],
)
def test_local_devices_have_their_data_sheets_numbers(kind, peak, bandwidth, chips, monkeypatch):
    device = SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [device] * 8)
    found = local_target()
    assert (found.peak, found.chips) == (peak * 1e12, chips)
    assert found.bandwidth == (None if bandwidth is None else bandwidth * 1e9)


def test_without_libtpu_the_plan_is_for_the_devices_here(tiny_one, folder, monkeypatch):
    monkeypatch.setattr("selm_jax.plan.command.has_libtpu", lambda: False)
    load, _ = tiny_one
    console = quiet()
    given = {"config": folder / "model/config.json", "options": of(tries=0), "console": console}
    assert command.main(load, ["v5e:4x8"], **given) == 0
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "libtpu is not installed" in said and "FITS on 8 x cpu (local)" in said


def test_a_config_that_cannot_be_had_says_what_to_do(monkeypatch):
    def silent(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(facts, "hf_hub_download", silent)
    with pytest.raises(SourceError, match=r"acme/novel-9b: its config.json .*--config FILE"):
        facts.config_json("acme/novel-9b")
    with pytest.raises(SourceError, match=r"runs/x/model: there is no such folder.*--config FILE"):
        facts.config_json("runs/x/model")


def test_a_local_folders_config_is_read(folder):
    assert facts.config_json(str(folder / "model")) == folder / "model" / "config.json"


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_tiny_programs_compile_for_a_slice_that_is_not_here(name, folder):
    e = config.load(
        folder / "experiment.yaml",
        ["compute={}", "training.rows=8", "rollout.slots=8", "rollout.prefill_rows=8"],
    )
    read = command.read_facts(folder / "model" / "config.json")
    where = target(name)
    plan = examine.compiled(e, read, where, of(), quiet())
    assert plan.fit and plan.mesh == {"data": 1, "fsdp": len(where.devices), "tensor": 1}
    b = Blueprint(e, read, where)
    assert b.devices.dtype == jnp.bfloat16 and shard_bytes(b.decoding_params) < 2 * sum(
        x.value.size for x in jax.tree.leaves(abstract_params(b.programs.config), is_leaf=_is_box)
    ) + 2 * len(jax.tree.leaves(b.decoding_params))  # fmt: skip
    assert {f.name for f in plan.fits} >= {"prefill", "decode", "score", "apply"}


def _is_box(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)
