"""An exploration term of your own, tried in the laboratory, then on a language model.

Against SELM and DPO, in four landscapes, with 128 seeds, from the root of the repository:

    PYTHONPATH=. selm lab idea dpo+experiments.lab.my_idea:saturating weight=0.01,0.1

On a language model, the same function under the same name (`my_idea.yaml` beside this file):

    PYTHONPATH=. selm run experiments/lab/my_idea.yaml
"""

from jax.nn import softplus


def saturating(weight: float, beta: float):
    """Optimism that stops pushing once the reference's response has become unlikely.

    SELM's term is linear in the log-ratio: it pushes on for ever. This one flattens out below 0.
    """

    def loss(logps):
        bonus = weight * softplus(beta * logps.log_ratio("explore"))
        return bonus, {"loss/saturating": bonus}

    return loss
