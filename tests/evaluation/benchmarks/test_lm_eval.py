"""The harness on our engine against the harness on its own HF model, request by request."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import load_file, save_file

from selm_jax.commands import tiny
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.lm_eval import adapter as lm_eval
from selm_jax.evaluation.benchmarks.lm_eval import run as verb
from selm_jax.evaluation.benchmarks.lm_eval import tasks as lm_eval_tasks
from selm_jax.evaluation.model import open_model
from selm_jax.policy.policy import named_by_text

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `lm-eval`)")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.usefixtures("local_tasks")
QUIET = Console(quiet=True)
WORDS = [
    "river",
    "chair",
    "song",
    "letter",
    "train",
    "soup",
    "garden",
    "coat",
    "paint",
    "quiet",
    "under",
    "über",
    "水",
    "naïve",
]


def instances(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def sentence(rng, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


@pytest.fixture(scope="module")
def ours(model):
    return lm_eval.Harness(model)


@pytest.fixture(scope="module")
def theirs(folders):
    return hf_model(folders[0], batch_size=3)


def hf_model(folder: Path, batch_size: int):
    pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    pytest.importorskip("accelerate", reason="lm-eval's HF model wants accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), dtype="float32", device="cpu", batch_size=batch_size)


def both(folder: Path):
    """One model in our harness and in theirs. In a larger batch theirs goes on after an end until
    all texts have one, and looks for BOS in the first context alone."""
    return lm_eval.Harness(open_model(str(folder), slots=8, console=QUIET)), hf_model(folder, 1)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A model whose tokenizer puts BOS in front of any text, in both harnesses."""
    folder = tmp_path_factory.mktemp("with_bos") / "llama-3"
    tiny.make_model(folder, tiny._family(folder.name))
    return both(folder)


@pytest.fixture(scope="module", params=["plain", pytest.param("with_bos", marks=pytest.mark.slow)])
def either(request):
    """Our harness and theirs on a model whose tokenizer adds nothing, then on one that adds BOS."""
    if request.param == "with_bos":
        return request.getfixturevalue("with_bos")
    return request.getfixturevalue("ours"), request.getfixturevalue("theirs")


@pytest.fixture(scope="module")
def chatml_base(tmp_path_factory):
    """A base model in both harnesses: its vocabulary has <|im_end|>, its EOS is <|endoftext|>."""
    folder = tmp_path_factory.mktemp("chatml_base") / "model"
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    smollm = tiny._family("smollm")
    untied = {**smollm.model, "tie_word_embeddings": False}
    tiny.make_model(
        folder, dataclasses.replace(smollm, model=untied, special=special, eos=special[-1])
    )
    file = folder / "model.safetensors"
    weights = load_file(file)
    scale = np.ones((len(weights["lm_head.weight"]), 1), np.float32)
    scale[-3:-1] = 2  # so that both tokens of ChatML are the likeliest now and then
    save_file(
        weights | {"lm_head.weight": weights["lm_head.weight"] * scale}, file, {"format": "pt"}
    )
    return both(folder)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    """Four tasks on local rows, one of each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(3)
    rows = [
        {
            "question": sentence(rng, int(rng.integers(2, 9))),
            "choices": [sentence(rng, int(n)) for n in rng.integers(1, 4, 4)],
            "answer": int(rng.integers(4)),
            "text": sentence(rng, int(rng.integers(5, 30))),
        }
        for _ in range(14)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 7.5},
    }
    for name, rest in {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_last": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1] | join(' ')}}",
            "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "local_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "local_write": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}:",
            "doc_to_target": "text",
            "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **rest}))
    return folder


def test_loglikelihoods_are_those_of_the_hf_model(either, harness_parity):
    ours, theirs = either
    bos = ours.tokenizer.bos_token
    rng = np.random.default_rng(0)
    pairs = [(sentence(rng, n), " " + sentence(rng, m)) for n in (1, 3, 20) for m in (1, 2, 7)]
    pairs += [(pairs[0][0], " " + word) for word in WORDS]  # many continuations of one context
    pairs += [
        ("", "river"),
        ("", f"{bos}river"),  # begins with what stands before a text
        (f"{bos}river", " song"),
        ("a trailing space ", "song"),  # moves to the continuation
        ("two  ", " spaces"),
        ("<|im_start|>user\nA river?<|im_end|>\n", "yes"),
        (pairs[0][0], pairs[0][1]),  # asked twice
        (sentence(rng, 400), " " + sentence(rng, 12)),  # longer than the model: cut at the left
        ("river", " " + sentence(rng, 40)),
    ]
    # What greedy decoding says, so that the flag is true somewhere.
    said = theirs.generate_until(
        instances("generate_until", [(c, {"until": [], "max_gen_toks": 4}) for c, _ in pairs[:6]])
    )
    pairs += [(c, text) for (c, _), text in zip(pairs, said, strict=False) if text]
    asked = instances("loglikelihood", pairs)
    got, want = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    harness_parity(
        f"{ours.model.name} log-likelihood",
        max(abs(a[0] - b[0]) for a, b in zip(got, want, strict=True)),
    )
    np.testing.assert_allclose([a for a, _ in got], [b for b, _ in want], rtol=0, atol=1e-4)
    assert [flag for _, flag in got] == [flag for _, flag in want]
    assert any(flag for _, flag in want) and not all(flag for _, flag in want)


def test_rolling_loglikelihoods_are_those_of_the_hf_model(either, harness_parity):
    ours, theirs = either
    rng = np.random.default_rng(1)
    texts = [(sentence(rng, n),) for n in (1, 9, 60, 320)]  # the last of several windows
    assert len(ours.tok_encode(texts[-1][0])) > ours.max_length
    asked = instances("loglikelihood_rolling", texts)
    got, want = ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked)
    harness_parity(
        f"{ours.model.name} rolling",
        max(abs(a - b) for a, b in zip(got[:-1], want[:-1], strict=True)),
    )
    # Thousands of nats: the HF model sums them in float32, whose steps there are larger than 1e-4.
    np.testing.assert_allclose(got, want, rtol=2e-7, atol=1e-4)


def test_generations_are_those_of_the_hf_model(either):
    ours, theirs = either
    rng = np.random.default_rng(2)
    contexts = [sentence(rng, int(n)) for n in rng.integers(1, 40, 7)] + [sentence(rng, 400)]
    contexts.append(f"{ours.tokenizer.bos_token}river")
    settings = [
        {"until": ["e"], "max_gen_toks": 24},
        {"until": ["r s", "\n\n", "a"], "max_gen_toks": 40, "do_sample": False},
        {"until": "never said", "max_gen_toks": 24, "temperature": 0.0},
    ]
    asked = instances("generate_until", [(c, s) for c in contexts for s in settings])
    got, want = ours.generate_until(asked), theirs.generate_until(asked)
    assert got == want
    assert len(set(want)) > 12


def test_special_tokens_end_texts_as_in_the_hf_model(chatml_base):
    ours, theirs = chatml_base
    rng = np.random.default_rng(4)
    contexts = [sentence(rng, int(n)) for n in rng.integers(1, 9, 8)]
    prompts = [tuple(ours.tok_encode(c)) for c in contexts]
    asked = named_by_text(prompts, greedy=1, samples=0)
    unended = ours.model.answer(asked, max_new_tokens=40)
    said = [ours.tokenizer.decode(list(response.tokens)) for response in unended]
    # An end of several tokens, as gsm8k_cot_llama has one: a piece of what the model says.
    around = next(m[0] for m in (re.search(r"[!-~]<\|im_end\|>[!-~]", s) for s in said) if m)
    texts = []
    for until in (
        ["Q:"],
        ["Q:", "</s>", "<|im_end|>"],  # of gsm8k_cot
        [around],
        ["im_e"],  # theirs sees it in the token's name
    ):
        settings = {"until": until, "max_gen_toks": 40, "do_sample": False}
        until_there = instances("generate_until", [(c, settings) for c in contexts])
        texts.append(theirs.generate_until(until_there))
        assert ours.generate_until(until_there) == texts[-1], until
    # A token that is an end stops the engine at once, and is the response's last.
    end = ours.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stopped = ours.model.answer(
        asked, max_new_tokens=40, also_stop=ours._special(["Q:", "</s>", "<|im_end|>"])
    )
    for free, short in zip(unended, stopped, strict=True):
        length = free.tokens.index(end) + 1 if end in free.tokens else len(free.tokens)
        assert short.tokens == free.tokens[:length]
    whole, *ended = texts
    assert all(each != whole for each in ended)
    assert len({len(text) for text in ended[0]}) > 3 and ended[0] == ended[2] != ended[1]


def test_whole_evaluations_are_those_of_the_hf_model(ours, theirs, task_folder):
    names = ["local_choice", "local_write", "local_last", "local_rolling"]
    for chat in (False, True):
        found = []
        # A rolling text has no prompt that a template could hold.
        shots = {n: 0 if n == "local_rolling" else 2 for n in names[: 2 if chat else 4]}
        for harness in (ours, theirs):
            manager = TaskManager(include_path=str(task_folder), include_defaults=False)
            loaded = lm_eval_tasks.load_tasks(shots, manager)
            found.append(
                simple_evaluate(
                    harness, tasks=loaded, task_manager=manager, bootstrap_iters=0,
                    apply_chat_template=chat, fewshot_as_multiturn=chat,
                )
            )  # fmt: skip
        got, want = found
        assert got["results"].keys() == want["results"].keys()
        for name, metrics in want["results"].items():
            numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
            mine = {k: got["results"][name][k] for k in numbers}
            assert numbers and mine == pytest.approx(numbers, rel=1e-5), name
            for a, b in zip(got["samples"][name], want["samples"][name], strict=True):
                assert a["arguments"] == b["arguments"]  # the same prompts, shots and template


def test_the_verb_writes_results_with_names_versions_and_shots(model, task_folder, tmp_path):
    seen = Console(record=True, width=140)
    asked = {"include": task_folder, "limit": 3, "chat": False, "console": seen}
    out = tmp_path / "out"
    verb.run(model, "local_choice:2,local_write", out=out, **asked)
    results = json.loads((out / "results.json").read_text())
    assert results["selm"]["tasks"] == [
        {"task": "local_choice", "version": 7.5, "shots": 2},
        {"task": "local_write", "version": 7.5, "shots": 0},
    ]
    assert not results["selm"]["chat"] and not results["selm"]["shots_as_turns"]
    assert "no chat template, shots as text" in seen.export_text()
    results["selm"] |= {"chat": True, "shots_as_turns": True}
    verb.print_results(results, seen)
    assert ": chat template, shots as turns" in seen.export_text()
    assert results["config"]["selm_origin"]["sha256"] == model.folder.origin["sha256"]
    lines = (out / "samples" / "local_write.jsonl").read_text().splitlines()
    assert len(lines) == 3 and "resps" in json.loads(lines[0])
    with pytest.raises(EvaluationError, match="already exists"):
        verb.run(model, "local_write", out=out, **asked)


def test_a_dry_run_counts_and_writes_nothing(model, task_folder, tmp_path):
    seen = Console(record=True, width=140)
    verb.run(
        model, "local_choice,local_write", out=tmp_path / "out", include=task_folder, limit=2,
        chat=False, dry_run=True, console=seen,
    )  # fmt: skip
    shown = " ".join(seen.export_text().split())
    counter = lm_eval.Counter(model)
    rows = [json.loads(x) for x in (task_folder / "rows.jsonl").read_text().splitlines()[:2]]
    read = sum(len(counter.tok_encode(f"{row['question']}:")) for row in rows)
    assert f"answers 2 prompt tokens {read} new tokens, at most 40 " in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ("local_chose", "did you mean 'local_choice'"),
        ("local_choice:two", "'two' is not a number of shots"),
        (" , ", "--tasks is empty"),
        ("local_choice,local_choice:3", "local_choice twice"),
        (
            "local_choice:14",
            "14 shots, but there are only 13 rows .* besides the question .*local_choice:13",
        ),
        ("local_write,local_choice:99", "task local_choice: 99 shots"),
        ("local_rolling:1", "whole texts and cannot have shots"),
    ],
)
def test_tasks_that_nobody_knows_are_errors(model, task_folder, tmp_path, tasks, says):
    with pytest.raises(EvaluationError, match=says):
        verb.run(model, tasks, out=tmp_path / "out", include=task_folder, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_as_many_shots_as_there_are_rows_but_the_question(model, task_folder, tmp_path):
    seen = Console(record=True, width=140)
    verb.run(
        model, "local_choice:13", out=tmp_path / "out", include=task_folder, limit=2, chat=False,
        dry_run=True, console=seen,
    )  # fmt: skip
    assert "scored tokens" in seen.export_text()


def test_a_setting_that_the_engine_lacks_is_an_error(ours):
    asked = instances("generate_until", [("river", {"max_gen_toks": 3, "num_beams": 4})])
    with pytest.raises(EvaluationError, match="num_beams"):
        ours.generate_until(asked)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks is 0; expected 1"),
        ({"max_new_tokens": -3}, "max_gen_toks is -3"),
        ({"max_gen_toks": "many"}, "'many'.*Expected numbers"),
        ({"max_gen_toks": 3, "temperature": None}, "temperature.*Expected numbers"),
        ({"max_gen_toks": 3, "until": ["a", 5]}, "until has 5; expected strings"),
        ({"max_gen_toks": 3, "until": 5}, "until has 5"),
    ],
)
def test_odd_generation_settings_are_named(ours, settings, says):
    with pytest.raises(EvaluationError, match=says):
        ours.generate_until(instances("generate_until", [("river", settings)]))


@pytest.mark.parametrize("until", [None, [None], []])
def test_no_ends_are_none(ours, until):
    plain, given = ({"max_gen_toks": 6, **more} for more in ({}, {"until": until}))
    asked = instances("generate_until", [("river", plain), ("river", given)])
    one, other = ours.generate_until(asked)
    assert one == other and one


def test_the_papers_tasks_exist_with_their_shots():
    there = Path(inspect.getfile(TaskManager)).parent
    folders = ("gsm8k", "hellaswag", "arc", "truthfulqa", "eq_bench", "openbookqa")
    manager = TaskManager(include_path=[there / f for f in folders], include_defaults=False)
    assert lm_eval_tasks.tasks_of(["paper"], manager) == lm_eval_tasks.PAPER
    assert set(lm_eval_tasks.PAPER) <= set(manager.all_subtasks)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("humaneval_instruct", "humaneval_instruct"),
        ("humaneval_infilling", "humaneval_multi_line_infilling"),
        ("nested", "humaneval"),
        ("marks", "plain"),
        ("marked", "own"),
    ],
)
def test_a_task_of_code_is_refused_before_its_metric_is_fetched(
    tmp_path, monkeypatch, asked, named
):
    """lm-eval itself fails while it loads the metric, long before it looks at the task's mark."""

    def fetched(_):
        raise ValueError("set the environment variable HF_ALLOW_CODE_EVAL to 1")

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=fetched))
    there = Path(inspect.getfile(TaskManager)).parent
    member = {"task": "humaneval", "num_fewshot": 0}
    of_code = {"include": str(there / "humaneval/humaneval.yaml"), "task": "own", "tag": "marked"}
    group = {"group": "nested", "task": [{"group": "inner", "task": [member]}]}
    marks = {"group": "marks", "task": [{"task": "plain", "unsafe_code": True}]}
    plain = {k: v for k, v in of_code.items() if k != "tag"} | {
        "task": "plain",
        "unsafe_code": False,
    }
    files = {"own": of_code, "nested": group, "marks": marks, "plain": plain}
    for name, written in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(written))
    folders = [there / "humaneval", there / "humaneval_infilling", tmp_path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    with pytest.raises(EvaluationError, match=f"task {named}: it runs code .*Leave this task out"):
        lm_eval_tasks.load_tasks({asked: None}, manager)
