"""What training says of an update that it skips."""

from types import SimpleNamespace

from selm_jax.preferences.examples import Example
from selm_jax.stages.train import _skipped


def test_a_skipped_update_is_told_with_the_ids_of_prompts():
    examples = [Example(f"p{i}", (1,), ((2,),), {"chosen": 0}) for i in range(9)]
    said = _skipped(2, SimpleNamespace(updates=[examples[1:], examples]))
    assert said.startswith("update 2 is skipped")
    assert said.endswith("Its first prompts: p0, p1, p2, p3, p4, p5, p6, p7")
