"""An example of an exploration term of your own, for `selm lab` and for language models.

Run these commands in the root of the repository. In the laboratory, compare the term with SELM and
DPO, in four landscapes and with 128 seeds:

    PYTHONPATH=. selm lab idea dpo+experiments.lab.my_idea:saturating weight=0.01,0.1

Train a language model with the same function (see `my_idea.yaml` in this folder):

    PYTHONPATH=. selm run experiments/lab/my_idea.yaml
"""

from jax.nn import softplus


def saturating(weight: float, beta: float):
    """An optimism term whose gradient vanishes once the reference's response is unlikely.

    SELM's term is linear in the log-ratio, so its gradient never vanishes. This one flattens out
    for log-ratios below 0.
    """

    def loss(logps):
        bonus = weight * softplus(beta * logps.log_ratio("explore"))
        return bonus, {"loss/saturating": bonus}

    return loss
