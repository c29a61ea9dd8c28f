"""Losses with their settings, on which several tests of objectives run."""

# One of each, as a YAML file would write it.
EXAMPLES = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.2},
    "robust": {"beta": 0.1, "label_smoothing": 0.2},
    "ipo": {"beta": 0.2},
    "hinge": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "sft": {},
    "optimism": {"beta": 0.1, "alpha": 0.01},
    "selm": {"beta": 0.1, "alpha": 0.01},
    "xpo": {"beta": 0.1, "alpha": 0.01},
}
