"""A model in Python answers, scores, and is trained in place, as a run does it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

import selm_jax as selm
from selm_jax import config
from selm_jax.api.errors import ApiError
from selm_jax.api.pairs import Pairs
from selm_jax.config import ConfigError
from selm_jax.iterate import iterate
from selm_jax.objectives.losses import ObjectiveError
from selm_jax.policy import sizes
from selm_jax.policy.policy import PolicyError
from selm_jax.preferences.batches import examples_of
from selm_jax.preferences.candidates import FeedbackError
from selm_jax.run.run import Run
from selm_jax.tables import examples as table
from selm_jax.text.tokenizer import Tokenizer
from selm_jax.training.loop import TrainingError
from selm_jax.weights.sources import SourceError

PROMPTS = tiny.PROMPTS[:6]
SELM = {"beta": 0.1, "alpha": 0.01}


def leaves(params) -> list[np.ndarray]:
    return [np.asarray(each) for each in jax.tree.leaves(params)]


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


ADAPTERS = pytest.param({"rank": 4, "alpha": 8, "dropout": 0.1}, marks=pytest.mark.slow)


@pytest.mark.parametrize("lora", [None, ADAPTERS])
def test_its_updates_are_those_of_a_run_to_the_bit(tmp_path, lora):
    """From a run's examples, in the run's order, come the parameters that the run exports."""
    settings = {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-3}
    file = tiny.experiment(
        tmp_path, iterations=1, data__heldout=None, objective={"loss": "selm", **SELM},
        **{f"training__{key}": value for key, value in settings.items()},
        **({"lora": lora} if lora else {}),
    )  # fmt: skip
    e = config.load(file)
    iterate(Run(e))
    examples = table.read(tmp_path / "run" / "iteration_1" / "examples.parquet")
    model = selm.load(tmp_path / "model", lora=lora)
    t = e.training
    trainer = selm.Trainer(
        model, loss=selm.loss("selm", **SELM), learning_rate=1e-3, remat=t.remat,
        logprob_chunk=t.logprob_chunk,
        rows=t.rows, row_length=t.row_length,
    )  # fmt: skip
    for step in range(len(examples) // t.global_batch):
        batch = examples_of(step, examples, global_batch=t.global_batch, seed=e.seed, iteration=1)
        trainer.step(Pairs(tuple(batch), ({},) * len(batch), {}, model.tokenizer))
    assert trainer.updates > 2
    if lora is None:  # of adapters, dropout is drawn from the run's seed
        assert equal(model._trained, selm.load(tmp_path / "run")._trained)
    saved = selm.load(model.save(tmp_path / "saved"))
    assert equal(saved._trained, model._policy.weights.to_score())


def test_what_it_says_changes_with_its_parameters_and_the_reference_does_not(model, pairs):
    before = model.logps(pairs)
    trainer = selm.Trainer(model, loss=selm.loss("dpo", beta=0.1), learning_rate=1e-2)
    losses = [trainer.step(pairs)["loss"] for _ in range(3)]
    after = model.logps(pairs)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[0] > losses[1] > losses[2], "the reference stayed where it was"
    margin = (after["chosen"] - before["chosen"]) - (after["rejected"] - before["rejected"])
    assert (margin > 0).all()
    first = pairs[0]
    assert before["chosen"][0] == pytest.approx(
        first.reference_logps[first.roles["chosen"]], abs=1e-4
    )
    fresh = model.generate(PROMPTS, greedy=1, samples=3, max_new_tokens=12)
    assert fresh.updates == model.updates == 3


def test_the_optimism_term_lowers_what_the_policy_would_say_anyway(model, pairs):
    def only_optimism(logps):
        losses = logps.log_ratio("explore")
        return losses, {"explore": losses}

    before = model.logps(pairs)["explore"]
    told = selm.Trainer(model, loss=only_optimism, learning_rate=1e-3).step(pairs)
    assert told["explore"] == told["loss"] == pytest.approx(0, abs=1e-4)
    assert model.logps(pairs)["explore"].mean() < before.mean()


def test_logps_are_those_of_each_response_alone(model, pairs, alone_logps, spread):
    """Packed rows, devices and layouts change nothing: the oracle has each response in a row."""
    from selm_jax.models.decoder import Decoder

    tokens, starts, stops = spread(pairs.examples, sum(len(e.responses) for e in pairs), 128)
    decoder = Decoder(model._programs.config)
    found = iter(np.asarray(alone_logps(decoder, model._trained, tokens, starts, stops)))
    expected = [[next(found) for _ in e.responses] for e in pairs]
    for role, values in model.logps(pairs).items():
        right = [each[e.roles[role]] for each, e in zip(expected, pairs, strict=True)]
        np.testing.assert_allclose(values, right, rtol=1e-4, atol=1e-4)


def test_where_several_explore_their_mean_counts(model, answers):
    scores = selm.ranker("length")(PROMPTS, answers)
    pairs = selm.pairs(answers, scores, explore="all")
    example = next(e for e in pairs if len(e.explored) > 1)
    each = model._scores_of([example], model.tokenizer)[0]
    place = pairs.examples.index(example)
    expected = np.mean([each[i] for i in example.explored])
    assert model.logps(pairs)["explore"][place] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow_except("compute1")
@pytest.mark.parametrize("compute", [{"preset": "single"}, {"preset": "fsdp_tensor", "tensor": 2}])
def test_devices_change_nothing_but_the_last_bits(folder, pairs, compute):
    model = selm.load(folder, compute=compute)
    trainer = selm.Trainer(model, loss=selm.loss("selm", **SELM), learning_rate=1e-3)
    other = selm.load(folder)
    others = selm.Trainer(other, loss=selm.loss("selm", **SELM), learning_rate=1e-3)
    for _ in range(2):
        a, b = trainer.step(pairs), others.step(pairs)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("room", "remat", "chunk"), [(2**40, "none", 512), (0, "full", 32)])
def test_what_an_update_stores_follows_from_memory(folder, pairs, monkeypatch, room, remat, chunk):
    told = []
    for settings in ({}, {"remat": "dots", "logprob_chunk": 16}):
        monkeypatch.setattr(sizes, "room", lambda device: sizes.Room(room, "of a test"))
        model = selm.load(folder)
        trainer = selm.Trainer(model, loss="sft", learning_rate=1e-3, **settings)
        told.append([trainer.step(pairs)["grad_norm"] for _ in range(2)])
        batches = trainer._batches
        expected = (remat, chunk) if not settings else ("dots", 16)
        assert (batches.remat, batches.chunk) == expected
    assert told[0] == pytest.approx(told[1], rel=1e-5)


def test_samples_depend_on_the_seed_and_nothing_else(model):
    def texts(prompts, **how):
        return model.generate(prompts, greedy=0, max_new_tokens=8, **how).texts

    first = texts(PROMPTS, samples=2, seed=1)
    assert first == texts(PROMPTS, samples=2, seed=1)
    assert first != texts(PROMPTS, samples=2, seed=2)
    assert [each[:1] for each in first[:2]] == texts(PROMPTS[:2], samples=1, seed=1)


def test_it_opens_the_model_of_a_run_and_saves_a_folder_that_opens(tmp_path, model, pairs):
    selm.Trainer(model, loss="sft", learning_rate=1e-3).step(pairs)
    folder = model.save(tmp_path / "saved")
    again = selm.load(folder)
    assert all(
        (again.logps(pairs)[r] == model.logps(pairs)[r]).all() for r in ("chosen", "explore")
    )
    assert "1 updates" in (folder / "README.md").read_text()
    with pytest.raises(ApiError, match="saved already exists"):
        model.save(folder)


def test_a_learning_rate_may_be_a_function_of_the_update(model, pairs):
    trainer = selm.Trainer(model, loss="sft", learning_rate=lambda step: 1e-3 / (step + 1))
    assert [trainer.step(pairs)["learning_rate"] for _ in range(2)] == [1e-3, 5e-4]


def test_pairs_are_cut_into_batches_that_hold_each_once(pairs):
    batches = list(pairs.batches(4, seed=3))
    assert [len(each) for each in batches] == [4, len(pairs) - 4]
    ids = [example.prompt_id for each in batches for example in each]
    assert sorted(ids) == sorted(e.prompt_id for e in pairs) != ids
    assert [row["chosen"] for row in batches[0].rows] == list(batches[0].to_pandas()["chosen"])
    assert len(pairs[1:3]) == 2


# What is refused, in words that say what to do


@pytest.mark.parametrize(
    ("prompts", "how", "says"),
    [
        ([], {}, "prompts is an empty list"),
        ("Hello.", {}, r"Put it into a list: \['Hello.'\]"),
        ([""], {}, "prompt 0: empty prompt"),
        ([[{"role": "user"}]], {}, "prompt 0: bad message"),
        (["Hello."], {"greedy": 0, "samples": 0}, "nothing can be answered"),
        (["Hello."], {"max_new_tokens": 0}, "nothing can be answered"),
    ],
)
def test_prompts_that_cannot_be_answered(model, prompts, how, says):
    with pytest.raises(ApiError, match=says):
        model.generate(prompts, **how)


def test_a_prompt_without_room_for_its_answer(model):
    with pytest.raises(PolicyError, match="max_position_embeddings"):
        model.generate(["Hello."], max_new_tokens=4096)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match="nowhere"):
        selm.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"compute": {"presett": "fsdp"}}, "selm.load:\n.*compute.presett: unknown key.*preset"),
        ({"lora": {"rank": 4}}, "lora.alpha: missing"),
        ({"parameter_dtype": "float8"}, "training.parameter_dtype: 'float8'"),
    ],
)
def test_settings_of_a_model_are_checked_as_in_a_file(folder, how, says):
    with pytest.raises(ConfigError, match=says):
        selm.load(folder, **how)


def test_a_loss_or_setting_that_is_wrong(model, pairs):
    def rate(loss, **how):
        return selm.Trainer(model, loss=loss, **{"learning_rate": 1e-3} | how)

    with pytest.raises(ObjectiveError, match="unknown objective 'dpoo'.*dpo"):
        rate("dpoo")
    with pytest.raises(ObjectiveError, match="needs the setting 'beta'"):
        rate("dpo")
    with pytest.raises(ApiError, match="loss is 3"):
        rate(3)
    with pytest.raises(ApiError, match="trains a reward model"):
        rate("bradley_terry")
    with pytest.raises(ApiError, match="the counts of a whole iteration's answers"):
        rate(selm.loss("copo", beta=0.1, alpha=0.01))
    with pytest.raises(ApiError, match="log-probabilities of two references"):
        rate(selm.loss("inpo", beta=0.1))
    with pytest.raises(ApiError, match="log-probabilities of the shorter answer's length"):
        rate(selm.loss("ld_dpo", beta=0.1, ld_alpha=0.5))
    with pytest.raises(ConfigError, match="training.learning_rate"):
        rate("sft", learning_rate=-1.0)
    with pytest.raises(ConfigError, match="training.optimizer: 'adam'"):
        rate("sft", optimizer="adam")
    with pytest.raises(ObjectiveError, match="Return two things"):
        rate(lambda logps: logps.log_ratio("chosen")).step(pairs)
    with pytest.raises(ObjectiveError, match="one number per example"):
        rate(lambda logps: (logps.log_ratio("chosen").mean(), {})).step(pairs)
    assert model.updates == 0
    rate("sft").step(pairs)  # a loss that failed has left the model usable


def test_prompts_that_give_no_pair(model, answers):
    tied = selm.pairs(answers, [np.zeros(4)] * len(PROMPTS))
    assert len(tied) == 0 and tied.drops == {"tie": 6}
    assert "0 pairs, 6 prompts dropped (6 tie). " in repr(tied)
    with pytest.raises(TrainingError, match='draw more samples.*ties="first"'):
        selm.Trainer(model, loss="sft", learning_rate=1e-3).step(tied)
    assert all(len(values) == 0 for values in model.logps(tied).values())


def test_scores_that_do_not_fit(answers):
    with pytest.raises(ApiError, match="6 prompts, but scores for 1"):
        selm.pairs(answers, [np.zeros(4)])
    with pytest.raises(FeedbackError, match="prompt 0: .*4 candidates and 2 scores"):
        selm.pairs(answers, [[1.0, 2.0]] * len(PROMPTS))
    with pytest.raises(FeedbackError, match="feedback.rule is 'best_wrst'.*best_worst"):
        selm.pairs(answers, [np.arange(4.0)] * len(PROMPTS), rule="best_wrst")
    with pytest.raises(ApiError, match="6 prompts, answers to 6 and rows for 1"):
        selm.ranker("length")(PROMPTS, answers, rows=[{}])
    with pytest.raises(FeedbackError, match="unknown ranker 'sentimant'.*sentiment"):
        selm.ranker("sentimant")


def test_answers_of_before_an_update_have_lost_their_reference(model, answers, pairs, folder):
    selm.Trainer(model, loss="sft", learning_rate=1e-3).step(pairs)
    scores = selm.ranker("length")(PROMPTS, answers)
    with pytest.raises(
        ApiError, match="has been trained .updates: 1. since it wrote these answers"
    ):
        selm.pairs(answers, scores)
    fixed = selm.pairs(answers, scores, reference=selm.load(folder))
    assert fixed.examples == pairs.examples
    free = selm.pairs(answers, scores, reference=None)
    with pytest.raises(ApiError, match="reference=None"):
        selm.Trainer(model, loss=selm.loss("dpo", beta=0.1), learning_rate=1e-3).step(free)
    selm.Trainer(model, loss="sft", learning_rate=1e-3).step(free)


def test_answers_of_another_tokenizer_are_refused(tmp_path, model, pairs, monkeypatch):
    other = selm.load(tiny.make_model(tmp_path / "other"))
    other.logps(pairs)  # made alike: the same tokens
    monkeypatch.setattr(Tokenizer, "digest", lambda self: str(self.folder))
    for use in (other.logps, selm.Trainer(other, loss="sft", learning_rate=1e-3).step):
        with pytest.raises(ApiError, match="another model's tokenizer, not with that of other"):
            use(pairs)


def test_a_loss_that_is_not_finite_says_that_the_model_is_gone(model, pairs):
    def broken(logps):
        return logps.log_ratio("chosen") / 0.0, {}

    with pytest.raises(TrainingError, match="the loss is .*Load the model again"):
        selm.Trainer(model, loss=broken, learning_rate=1e-3).step(pairs)
