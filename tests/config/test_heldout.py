"""Named held-out sets: short and long form, and what is refused."""

import pytest
import yaml
from smallest import TREE

from selm_jax.config import ConfigError, dump, parse
from selm_jax.config.heldout import HeldoutSet


def experiment(sets, heldout="h.jsonl"):
    data = {"train": "t.jsonl", "heldout": heldout, "heldout_sets": sets}
    return parse(TREE | {"data": data})


def test_a_source_alone_is_short_for_a_group_and_both_are_written_and_read_again():
    e = experiment({"safety": "s.jsonl", "news": {"source": "acme/news", "split": "test"}})
    assert e.data.heldout_sets == {
        "safety": HeldoutSet("s.jsonl"),
        "news": HeldoutSet("acme/news", split="test"),
    }
    assert parse(yaml.safe_load(dump(e))) == e


@pytest.mark.parametrize(
    ("sets", "heldout", "message"),
    [
        ({"a": "s.jsonl"}, None, "data.heldout_sets: they are evaluated besides data.heldout"),
        ({"a/b": "s.jsonl"}, "h", "data.heldout_sets.a/b: a name becomes part of"),
        ({"pairs": "s.jsonl"}, "h", "data.heldout_sets.pairs: metrics of data.heldout have this"),
        ({"a": {"source": "s", "splt": "x"}}, "h", "heldout_sets.a.splt: unknown key.*split"),
        ({"a": {}}, "h", "data.heldout_sets.a.source: missing"),
        (["s.jsonl"], "h", "data.heldout_sets: .*a group of settings was expected"),
    ],
)
def test_what_is_refused(sets, heldout, message):
    with pytest.raises(ConfigError, match=message):
        experiment(sets, heldout)
