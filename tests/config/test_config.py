"""The experiment file: what it says comes back, what it does not mean is an error."""

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selm_jax import config
from selm_jax.config import ConfigError, Experiment, plain_yaml

TREE = {
    "output": "runs/x",
    "iterations": 3,
    "model": {"source": "m"},
    "data": {"train": "t"},
    "candidates": {"dataset": False, "samples": 3},
    "objective": {"loss": "selm", "beta": 0.1, "alpha": 1e-3},
    "training": {"learning_rate": 5e-7, "global_batch": 8},
}


def write(tmp_path, text):
    file = tmp_path / "e.yaml"
    file.write_text(text)
    return file


def test_every_experiment_of_the_repository_is_valid():
    files = sorted(Path(__file__).parents[2].glob("experiments/**/*.yaml"))
    assert files
    for file in files:
        if "grid" not in config.read(file):  # a sweep: tests/experiments/test_ablations.py
            config.load(file)


def test_dump_and_parse_are_inverse():
    experiment = config.parse(TREE)
    assert config.parse(plain_yaml.read(config.dump(experiment))[0]) == experiment


@given(st.floats(1e-12, 1), st.integers(1, 2**20), st.text(min_size=1))
def test_any_values_survive(rate, batch, source):
    tree = TREE | {
        "training": {"learning_rate": rate, "global_batch": batch},
        "model": {"source": source},
    }
    experiment = config.parse(tree)
    assert config.parse(plain_yaml.read(config.dump(experiment))[0]) == experiment


@pytest.mark.parametrize("text,value", [("5e-7", 5e-7), ("1.5E-5", 1.5e-5), ("-2e3", -2000.0)])
def test_numbers_with_an_exponent_are_numbers(tmp_path, text, value):
    file = write(tmp_path, f"{yaml.safe_dump(TREE)}seed: 1\n")
    experiment = config.load(file, [f"objective.alpha={text}"])
    assert experiment.objective["alpha"] == value


def test_overrides_reach_any_depth(tmp_path):
    file = write(tmp_path, yaml.safe_dump(TREE))
    experiment = config.load(
        file, ["training.rows=2", "feedback.settings.target=80", "data.heldout=null"]
    )
    assert experiment.training.rows == 2
    assert experiment.feedback.settings == {"target": 80}
    assert experiment.data.heldout is None


def test_all_mistakes_are_named_at_once(tmp_path):
    tree = TREE | {"itertions": 3, "training": {"learning_rate": "fast", "globl_batch": 8}}
    with pytest.raises(ConfigError) as error:
        config.load(write(tmp_path, yaml.safe_dump(tree)))
    message = str(error.value)
    assert "e.yaml" in message
    assert "itertions: unknown key; did you mean 'iterations'?" in message
    assert "training.globl_batch: unknown key; did you mean 'global_batch'?" in message
    assert "training.global_batch: missing" in message
    assert "'fast'" in message


@pytest.mark.parametrize(
    "change,said",
    [
        ({"objective": {"beta": 0.1}}, "objective.loss"),
        ({"candidates": {"dataset": False}}, "a pair needs at least 2"),
        ({"candidates": {"dataset": True}}, "data.chosen"),
        ({"candidates": {"greedy": 2, "dataset": False}}, "candidates.greedy"),
        ({"iterations": 0}, "iterations"),
        ({"data": {"train": "t", "portions": 2}}, "data.portions"),
        (
            {"training": {"learning_rate": [0.1, 0.2], "global_batch": 8}},
            "2 values for 3 iterations",
        ),
        ({"objective": {"loss": "selm", "alpha": [0.1, 0]}}, "objective.alpha: 2 values for 3"),
        ({"objective": {"loss": "selm", "alpha": []}}, "objective.alpha: an empty list"),
        ({"training": {"learning_rate": 1, "global_batch": 0}}, "training.global_batch"),
        ({"rollout": {"slots": 0}}, "rollout.slots"),
        ({"feedback": {"budget": 7}}, "fewer than one batch of training.global_batch = 8"),
    ],
)
def test_settings_that_contradict_each_other(change, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        config.parse(TREE | change)


def test_all_that_groups_contradict_is_named_at_once():
    tree = TREE | {
        "text": {"max_length": 5, "max_prompt_length": 7},
        "data": {"train": "t", "system": "x", "system_column": "y", "rejected_score": "s"},
        "feedback": {"acquisition": "entropy"},
        "training": TREE["training"] | {"rows": 2**20, "row_length": 2**20},
        "rollout": {"remote": {"engine": "vllm", "command": "vllm serve"}},
        "objective": {"loss": "dpo", "beta": float("inf")},
    }
    with pytest.raises(ConfigError) as error:
        config.parse(tree)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "data.rejected_score", "data.system_column", "feedback.acquisition", "objective.beta",
        "rollout.remote.command", "text.max_length", "text.max_prompt_length",
        "text.max_prompt_length", "training.rows",
    ]  # fmt: skip


def test_not_yaml_and_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such experiment file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(write(tmp_path, "a: [1"))
    with pytest.raises(ConfigError, match="a mapping of settings was expected"):
        config.load(write(tmp_path, "- 1"))


def test_mistakes_name_their_file_and_line(tmp_path):
    lines = yaml.safe_dump(TREE, sort_keys=False).splitlines()
    lines += ["rollout: {slots: 0,", "  top_p: 0}", "log:", "  tensorbord: false", "lora: 3"]
    file = write(tmp_path, "\n".join(lines))

    def line(key):
        return next(n for n, each in enumerate(lines, 1) if key in each)

    with pytest.raises(ConfigError) as error:
        config.load(file, ["training.rows=none", "feedback.rule=best", "data.shuffle=yes"])
    message = str(error.value)
    assert message.startswith(f"{file}:\n")
    for expected in (
        f"line {line('slots')}: rollout.slots: 0, a whole number",
        f"line {line('top_p')}: rollout.top_p: 0, a number above 0",
        f"line {line('tensorbord')}: log.tensorbord: unknown key; did you mean 'tensorboard'?",
        f"line {line('lora')}: lora: 3, a group of settings was expected",
        "override: training.rows: 'none', a whole number",
        "override: feedback.rule: 'best' is not allowed here; did you mean 'best_worst'?",
        "override: data.shuffle: 'yes', true or false was expected",
    ):
        assert f"\n  {expected}" in message, message
    file = write(tmp_path, "\n".join(lines[:-5] + ["text: {max_length: 5}"]))
    with pytest.raises(
        ConfigError, match=rf"line {len(lines) - 4}: text.max_length: only text.lay"
    ):
        config.load(file)


@pytest.mark.parametrize(
    "override,said",
    [
        ("model.revision=042", "42, text was expected .in quotes"),
        ("model.source=null", "null, text was expected"),
        ("log.wandb=true", "true, text was expected"),
        ("seed=1_000", "'1_000', a whole number"),
        ("seed=1:30", "'1:30', a whole number"),
        ("text.date=20240726", "20240726, a date such as 2024-07-26"),
        ("text.date=2024-13-45", "'2024-13-45', a date"),
        ("training=3", "3, a group of settings was expected"),
        ("training.learning_rate=null", "null, a number above 0"),
        ("model.source.x=3", "source is not a group"),
        ("seed", "`key.path=value` was expected"),
        ("seed=[1", "override seed=...: the value cannot be read: line 1: not YAML"),
        ("objective.loss=3", "3 is not a name"),
        ("feedback.settings={a: 1, a: 2}", "the key a is given twice"),
    ],
)
def test_values_that_are_something_else_than_they_look(tmp_path, override, said):
    file = write(tmp_path, yaml.safe_dump(TREE))
    with pytest.raises(ConfigError, match=said):
        config.load(file, [override])


def test_values_mean_what_is_written(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(TREE).encode())  # a mark in front
    experiment = config.load(
        file, ["seed=042", "data.system=Answer #1", "model.revision='042'", ("data.prompt", "a=b")]
    )
    assert (experiment.seed, experiment.data.system) == (42, "Answer #1")
    assert (experiment.model.revision, experiment.data.prompt) == ("042", "a=b")


def _settings(cls=Experiment, prefix=""):
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{field.name}.")
        else:
            yield field.name


def test_no_setting_is_decoration():
    """Every field is read somewhere outside selm_jax/config."""
    own = Path(config.__file__).parent
    files = [p for p in own.parent.rglob("*.py") if p.parent != own]
    code = "".join(p.read_text() for p in files)
    unread = [
        name
        for name in _settings()
        if f".{name}" not in code and name not in ("data", "fsdp", "tensor")
    ]
    assert not unread


def test_a_folder_is_told_from_an_experiment_file(tmp_path):
    with pytest.raises(ConfigError, match=r"a folder; an experiment file.*config\.yaml"):
        config.load(tmp_path)


def test_a_filter_is_a_function_of_the_users_and_runs_here(tmp_path):
    file = write(tmp_path, yaml.safe_dump(TREE))
    assert config.load(file, ["rollout.filter=mine:keep"]).rollout.filter == "mine:keep"
    with pytest.raises(ConfigError, match="rollout.filter: 'top_k', expected the form"):
        config.load(file, ["rollout.filter=top_k"])
    with pytest.raises(ConfigError, match="rollout.filter: 'os:system', 'os' is part of Python"):
        config.load(file, ["rollout.filter=os:system"])
    with pytest.raises(
        ConfigError, match="rollout.filter: mine:keep; the server of rollout.remote"
    ):
        config.load(file, ["rollout.filter=mine:keep", "rollout.remote={engine: vllm}"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.mixture={kind: nash}"], "weight: missing; kind: nash needs a number"),
        (
            ["rollout.mixture={kind: policy_reference, weight: 0.3}"],
            "policy_reference draws from the policy and the reference alone",
        ),
        (
            ["rollout.mixture={kind: nash, weight: 0.3}", "rollout.remote={engine: vllm}"],
            "a server has one model only and cannot mix two",
        ),
        (
            ["rollout.mixture={kind: nash, weight: 0.3}", "candidates.samples=0"],
            "changes sampled answers only, and candidates.samples is 0",
        ),
        (
            ["rollout.weights=int8", "rollout.remote={engine: vllm}"],
            "the server of rollout.remote reads the model folder itself",
        ),
    ],
)
def test_mixtures_and_int8_weights_are_of_the_engine_here(tmp_path, overrides, said):
    file = write(tmp_path, yaml.safe_dump(TREE))
    with pytest.raises(ConfigError, match=said):
        config.load(file, overrides)


def test_importance_weights_need_a_server_that_reports_the_policys_log_probabilities(tmp_path):
    file = write(tmp_path, yaml.safe_dump(TREE))
    weights, sglang = "training.importance={mode: token_mask}", "rollout.remote={engine: sglang}"
    pairs = ("data.chosen=chosen", "data.rejected=rejected")
    with pytest.raises(ConfigError, match=r"SGLang reports them after rollout.temperature: 0.7"):
        config.load(file, [weights, sglang, "rollout.temperature=0.7"])
    for fine in (
        [weights, sglang, "rollout.temperature=1.0"],
        [weights, "rollout.remote={engine: vllm}", "rollout.temperature=0.7"],
        [weights, sglang, "rollout.temperature=0.7", "candidates={greedy: 1, samples: 0}", *pairs],
        [sglang, "rollout.temperature=0.7"],
    ):
        config.load(file, fine)


def test_routers_are_not_trained_by_adapters(tmp_path):
    file = write(tmp_path, yaml.safe_dump(TREE))
    trained, lora = "training.router=trained", "lora={rank: 2, alpha: 4}"
    with pytest.raises(ConfigError, match="with lora only the adapters are trained"):
        config.load(file, [trained, lora])
    for fine in ([trained], [lora]):
        config.load(file, fine)
