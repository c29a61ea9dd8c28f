"""An experiment file that begins from another one: what it names changes, all else stays."""

import pytest

from selm_jax import config
from selm_jax.config import ConfigError

WHOLE = """output: runs/whole
iterations: 2
model: {source: m}
data: {train: t, chosen: chosen, rejected: rejected}
objective: {loss: selm, beta: 0.1, alpha: 1e-3}
feedback:
  ranker: length
  settings: {target: 80}
training:
  learning_rate: [1e-3, 5e-4]
  global_batch: 8
lora: {rank: 4, alpha: 8, rslora: true}
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "whole.yaml").write_text(WHOLE)

    def file(text, name="mine.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return file


def merged(file):
    """The settings as a dictionary that a change may be written into."""
    return config.as_dict(config.load(file))


def test_a_group_changes_the_keys_that_it_names(write, tmp_path):
    file = write(
        "base: whole.yaml\noutput: runs/mine\ntraining: {rows: 2}\nlora: {rank: 2}\n"
        "rollout: {top_k: 5}\n"
    )
    expected = merged(tmp_path / "whole.yaml")
    expected["output"] = "runs/mine"
    expected["training"]["rows"] = expected["lora"]["rank"] = 2
    expected["rollout"]["top_k"] = 5
    assert merged(file) == expected


def test_settings_of_a_loss_a_ranker_or_a_template_are_replaced_together(write):
    """Those of another loss or ranker are other settings: alpha is none of dpo."""
    file = write(
        "base: whole.yaml\nobjective: {loss: dpo, beta: 0.1}\n"
        "feedback: {ranker: sentiment, settings: {}}\nlora: null"
    )
    one = config.load(file)
    assert one.objective == {"loss": "dpo", "beta": 0.1}
    assert (one.feedback.ranker, one.feedback.settings, one.lora) == ("sentiment", {}, None)


def test_a_base_lies_beside_its_file_and_may_have_one_itself(write, tmp_path, monkeypatch):
    middle = write("base: ../whole.yaml\niterations: 1\ntraining: {learning_rate: 0.1}", "a/m.yaml")
    file = write("base: m.yaml\nseed: 7", "a/mine.yaml")
    monkeypatch.chdir(middle.parent.parent.parent)
    one = config.load(file, ["data.train=u"])
    assert (one.seed, one.iterations, one.output, one.data.train) == (7, 1, "runs/whole", "u")
    assert one.training.learning_rate == (0.1,)


def test_what_is_written_down_is_the_whole_experiment(write):
    one = config.load(write("base: whole.yaml\nseed: 7"))
    text = config.dump(one)
    assert "base: full" in text and "whole.yaml" not in text
    assert config.load(write(text, "config.yaml")) == one


def test_mistakes_name_the_file_and_the_line_that_they_stand_in(write, tmp_path):
    broken = write(WHOLE.replace("global_batch: 8", "global_batch: 0"), "broken.yaml")
    file = write("base: broken.yaml\nseed: -1\ntraining: {rows: 0}")
    with pytest.raises(ConfigError) as error:
        config.load(file, ["training.epochs=0"])
    message = str(error.value)
    assert message.startswith(f"{file}:\n")
    for said in (
        f"{broken}, line 11: training.global_batch: 0,",
        "\n  line 2: seed: -1,",
        "\n  line 3: training.rows: 0,",
        "\n  override: training.epochs: 0,",
    ):
        assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: none.yaml", r"none\.yaml: no such experiment file"),
        ("base: mine.yaml", r"mine\.yaml: its base, .*mine\.yaml, extends this file"),
        ("base: 3", r"line 1: base: 3; the name of an experiment file was expected"),
        ("base: [whole.yaml]", r"the name of an experiment file was expected"),
    ],
)
def test_a_base_that_is_none(write, text, said):
    with pytest.raises(ConfigError, match=said):
        config.load(write(text))


def test_two_files_cannot_begin_from_each_other(write):
    write("base: mine.yaml", "other.yaml")
    with pytest.raises(ConfigError, match="extends this file in turn. Name another base"):
        config.load(write("base: other.yaml"))
