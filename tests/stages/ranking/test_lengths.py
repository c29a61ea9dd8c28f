"""The report of lengths: whose answers it counts."""

from selm_jax.stages.ranking.lengths import lengths_of
from selm_jax.tables.ranked import Row


def row(source, tokens, score, **roles):
    ids = None if tokens is None else tuple(range(tokens))
    return Row("p", "q", 0, source, 0, ids, "text", "stop", score, **roles)


def test_roles_and_sources_are_counted_apart():
    rows = [
        row("greedy", 10, 1.0, explore=True),
        row("sample", 30, 3.0, chosen=True),
        row("chosen", 90, 2.0),
        row("rejected", 50, 0.5, rejected=True),
        row("rejected", None, 9.0, rejected=True),
    ]
    found = lengths_of(rows)
    assert [found[f"length/{who}"] for who in ("chosen", "rejected", "policy")] == [30, 50, 20]
    assert found["length/policy_p10"] == 12
    assert found["length/slope"] > 0
    assert "length/slope_stderr" not in found  # one prompt does not say how far others differ
    assert lengths_of([row("chosen", None, 1.0, chosen=True)]) == {}
