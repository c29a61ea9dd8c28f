"""Losses with their settings, on which several tests of objectives run."""

from selm_jax.objectives.build import TABLE
from selm_jax.objectives.objective import CHOICES

_BETA, _ALPHA = {"beta": 0.1}, {"beta": 0.1, "alpha": 0.01}
_NOISY = _BETA | {"label_smoothing": 0.2}

# One of each, as a YAML file would write it.
EXAMPLES = {
    "dpo": _BETA,
    "cdpo": _NOISY,
    "robust": _NOISY,
    "ipo": {"beta": 0.2},
    "hinge": _BETA,
    "sigmoid_norm": {"beta": 5.0},
    "exo_pair": _NOISY,
    "discopop": _BETA | {"tau": 0.05},
    "nca_pair": _BETA,
    "bco_pair": _BETA,
    "apo_zero": _BETA,
    "apo_down": _BETA,
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "sft": {},
    "wpo": _BETA,
    "ld_dpo": _BETA | {"ld_alpha": 0.3},
    "optimism": _ALPHA,
    "selm": _ALPHA,
    "xpo": _ALPHA,
    "vpo": _ALPHA,
    "se_popo": _ALPHA,
    "copo": _ALPHA,
    "geb": _ALPHA,
    "sppo_hard": _BETA,
    "sppo": _BETA,
    "ipo_online": _BETA,
    "inpo": {"beta": 0.2, "start_share": 0.25},
    "nash": _BETA,
}
assert {*EXAMPLES, "bradley_terry"} == {*TABLE}, "every loss needs an example here"

# The same with every choice that is not a number.
VARIANTS = [(name, settings) for name, settings in EXAMPLES.items()]
VARIANTS += [
    ("vpo", _ALPHA | {"sign": "pessimistic"}),
    ("ipo", {"beta": 0.2, "length_normalized": False}),
]
VARIANTS += [
    ("geb", _ALPHA | {"divergence": divergence, "atom": atom, "length_normalized": mean})
    for divergence in CHOICES["divergence"]
    for atom in CHOICES["atom"]
    for mean in (False, True)
]
VARIANTS += [("geb", _ALPHA | {"bonus_of": "rejected"})]
VARIANTS += [
    (name, EXAMPLES[name] | {"f_divergence": divergence, "f_alpha": 0.3})
    for name in (
        *("dpo", "cdpo", "robust", "ipo", "hinge"),
        *("sigmoid_norm", "exo_pair", "discopop", "wpo", "ld_dpo"),
    )
    for divergence in CHOICES["f_divergence"][1:]
]
