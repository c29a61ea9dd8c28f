"""The examples of docs/extend.md work as written there, in `selm run` and in `selm preview`."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from rich.console import Console

from selm_jax import cli, config
from selm_jax.models.decoder import Decoder
from selm_jax.run.run import Run

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"


def shown(title: str) -> tuple[str, str, dict]:
    """Of a section: the name of its file, the file, and the settings that its diff arrives at."""
    text = PAGE.read_text()
    section = text[text.index(f"\n## {title}\n") + 1 :].partition("\n## ")[0]
    name, code, diff = re.search(
        r"`(\w+\.py)`:\n\n```python\n(.*?)```\n\n```diff\n(.*?)```", section, re.DOTALL
    ).groups()
    after = [line[1:] for line in diff.splitlines() if line[0] in " +"]
    return name, code, yaml.safe_load("\n".join(after))


@pytest.fixture
def selm(tmp_path, monkeypatch, capsys):
    """`selm(VERB, ...)`: what it prints. Modules in the folder can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    return run


def written(folder: Path, *titles: str, **more) -> tuple[Path, list[str]]:
    """A tiny experiment with these sections' files and settings, and the names of its modules."""
    changes, modules = {}, []
    for title in titles:
        name, code, settings = shown(title)
        (folder / name).write_text(code)
        modules.append(name.removesuffix(".py"))
        changes |= {f"{group}__{k}": v for group, keys in settings.items() for k, v in keys.items()}
    changes |= {"iterations": 1, "training__learning_rate": 1e-3, "data__heldout": None} | more
    return tiny.experiment(folder, **changes), modules


def forget(modules: list[str]) -> None:
    for module in modules:
        sys.modules.pop(module, None)


def ranked(folder: Path) -> dict[str, list[dict]]:
    """The candidates of every prompt."""
    found = defaultdict(list)
    for row in pq.read_table(folder / "run" / "iteration_1" / "ranked.parquet").to_pylist():
        found[row["prompt_id"]].append(row)
    return found


def test_a_pair_rule_and_an_explore_rule(tmp_path, selm):
    file, modules = written(tmp_path, "A pair rule", "An explore rule")
    assert "[prompt]" in selm("preview", file)
    assert set(modules) <= set(sys.modules)  # built, so that a mistake shows before the run
    forget(modules)
    selm("run", file)
    assert set(modules) <= set(sys.modules)
    pairs = [rows for rows in ranked(tmp_path).values() if rows[0]["dropped"] is None]
    assert len(pairs) >= 8
    for rows in pairs:
        order = np.argsort([-row["score"] for row in rows], kind="stable")
        assert [row["chosen"] for row in rows].index(True) == order[0]
        assert [row["rejected"] for row in rows].index(True) == order[1]  # of three
        lengths = [len(row["token_ids"]) for row in rows]
        assert [row["explore"] for row in rows].index(True) == int(np.argmax(lengths))
        assert sum(row["chosen"] + row["rejected"] + row["explore"] for row in rows) == 3
    forget(modules)
    text = selm("preview", file, "-n", 99)
    assert set(modules) <= set(sys.modules)
    assert "examples.parquet" in text.splitlines()[0]
    assert len(re.findall(r"^chosen.* tokens?: ", text, re.MULTILINE)) == len(pairs)


NONSENSE = """
from selm_jax.preferences.candidates import Pair

def pick(candidates, scores, rng):
    return Pair(0, len(candidates))

def two(candidates, scores):
    return Pair(0, 1)

def first(candidates, scores, rng):
    return 0.0
"""


@pytest.mark.parametrize(
    "setting,name,expected",
    [
        ("rule", "pick", r"prompt 'p0': .*:pick \(.*nonsense_of_mine.py\) returned .* 0 to 2"),
        ("explore", "first", r"prompt 'p0': .*:first \(.*nonsense_of_mine.py\) returned 0.0"),
        ("rule", "two", r"feedback.rule 'nonsense_of_mine:two': .*two\(candidates, scores, rng\)"),
        ("explore", "three", "feedback.explore 'nonsense_of_mine:three': .* has no 'three'"),
    ],
)
def test_nonsense_is_refused_with_file_and_prompt(
    tmp_path, selm, monkeypatch, capsys, setting, name, expected
):
    (tmp_path / "nonsense_of_mine.py").write_text(NONSENSE)
    forget(["nonsense_of_mine"])
    file = tiny.experiment(tmp_path, **{f"feedback__{setting}": f"nonsense_of_mine:{name}"})
    with pytest.raises(SystemExit) as stop:
        selm("run", file)
    said = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 1 and re.search(expected, said), said
    assert "Traceback" not in said
    done = (tmp_path / "run" / "iteration_1" / "responses").exists()
    assert done == (name in ("pick", "first"))  # what can be known before work is


def of_heldout(folder: Path) -> list[dict]:
    return pq.read_table(folder / "run" / "iteration_0" / "heldout.parquet").to_pylist()


@pytest.mark.slow
def test_a_sampler_filter(tmp_path, selm, all_logits):
    """Its samples are within it, its greedy answers and held-out ones as without it."""
    plain, filtered = tmp_path / "plain", tmp_path / "filtered"
    for each, titles in ((plain, ()), (filtered, ("A sampler filter",))):
        each.mkdir()
        sys.path.insert(0, str(each))
        file, modules = written(each, *titles, data__heldout=str(each / "heldout.jsonl"))
        if titles:
            assert "[prompt]" in selm("preview", file)
            assert not set(modules) & set(sys.modules)
        selm("run", file)
    assert of_heldout(plain) == of_heldout(filtered)
    forget(modules)
    assert "examples.parquet" in selm("preview", file) and not set(modules) & set(sys.modules)
    sys.path.remove(str(plain))
    sys.path.remove(str(filtered))

    run = Run(config.load(file), Console(quiet=True))
    prompts = {p.id: run.chat.prompt_ids(p.messages) for p in run.prompts(1)}
    decoder, params = Decoder(run.programs.config), run.programs.load(run.policy(0).path)
    kept = {}
    for folder in (plain, filtered):
        drawn = [
            (prompts[row["prompt_id"]], row["token_ids"])
            for rows in ranked(folder).values()
            for row in rows
            if row["source"] == "sample"
        ]
        tokens = np.zeros((len(drawn), 128), np.int32)
        for i, (prompt, answer) in enumerate(drawn):
            tokens[i, : len(prompt) + len(answer)] = (*prompt, *answer)
        shares = []
        for (prompt, answer), scores in zip(
            drawn, np.asarray(all_logits(decoder, params, tokens)), strict=True
        ):
            scores = scores[len(prompt) - 1 :][: len(answer)]
            least = scores.max(-1) - scores.std(-1) - 1e-4
            shares.append(scores[np.arange(len(scores)), list(answer)] >= least)
        kept[folder] = np.concatenate(shares).mean()
    assert kept[filtered] == 1 > kept[plain] + 0.2
    greedy = [
        [
            r["token_ids"]
            for rows in ranked(folder).values()
            for r in rows
            if r["source"] == "greedy"
        ]
        for folder in (plain, filtered)
    ]
    assert greedy[0] == greedy[1] != []
