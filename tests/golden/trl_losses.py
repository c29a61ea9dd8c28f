"""Records what TRL's own code says the losses are, in trl_losses.json beside this file.

Run it once with each of two TRL versions; each run replaces only its own part of the file:

    python -m venv trl-new && trl-new/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0
    trl-new/bin/python tests/golden/trl_losses.py
    python -m venv trl-old && trl-old/bin/pip install torch==2.13.0 trl==0.28.0 transformers==4.57.6
    trl-old/bin/python tests/golden/trl_losses.py

TRL 1.16.0 has the losses of DPOTrainer, of which all are recorded but `aot` and `aot_unpaired`, and
SimPO (experimental CPOTrainer). Its trainers run on batches that they tokenised and padded
themselves, with two random 2-layer Llamas as policy and reference; the log-probabilities that go
into the file are computed here from the models' plain logits. TRL 0.28.0 still has label smoothing
(cDPO) and XPO, both as methods that take log-probabilities, so they are fed random numbers. Nothing
is downloaded.
"""

import json
import platform
import sys
import tempfile
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

PATH = Path(__file__).with_suffix(".json")
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(60)]

# TRL's names of our settings, where they differ.
NAMES = {
    "tau": "discopop_tau",
    "f_divergence": "f_divergence_type",
    "f_alpha": "f_alpha_divergence_coef",
}

# (our name of the loss, TRL's `loss_type`, the settings in our names)
DPO_FORMS = [
    ("dpo", "sigmoid", {"beta": 0.1}),
    ("dpo", "sigmoid", {"beta": 0.01}),
    ("hinge", "hinge", {"beta": 0.1}),
    ("ipo", "ipo", {"beta": 0.1}),
    ("ipo", "ipo", {"beta": 0.5}),
    ("robust", "robust", {"beta": 0.1, "label_smoothing": 0.1}),
    ("robust", "robust", {"beta": 0.5, "label_smoothing": 0.3}),
    ("sft", "sft", {}),
    ("dpo+sft", ["sigmoid", "sft"], {"beta": 0.1}),
    ("sigmoid_norm", "sigmoid_norm", {"beta": 5.0}),
    ("exo_pair", "exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}),
    ("exo_pair", "exo_pair", {"beta": 0.5, "label_smoothing": 0.2}),
    ("nca_pair", "nca_pair", {"beta": 0.1}),
    ("bco_pair", "bco_pair", {"beta": 0.1}),
    ("sppo_hard", "sppo_hard", {"beta": 0.1}),
    ("apo_zero", "apo_zero", {"beta": 0.1}),
    ("apo_down", "apo_down", {"beta": 0.1}),
    ("discopop", "discopop", {"beta": 0.1, "tau": 0.05}),
    ("discopop", "discopop", {"beta": 0.02, "tau": 0.5}),
    ("0.5*hinge+0.2*bco_pair", ["hinge", "bco_pair"], {"beta": 0.1}),
    ("wpo", "sigmoid", {"beta": 0.1}),
    ("wpo", "sigmoid", {"beta": 0.5, "f_divergence": "js_divergence"}),
    ("ld_dpo", "sigmoid", {"beta": 0.1, "ld_alpha": 0.5}),
    ("ld_dpo", "sigmoid", {"beta": 0.5, "ld_alpha": 0.0}),
    ("ld_dpo", "sigmoid", {"beta": 0.1, "ld_alpha": 0.3, "f_divergence": "js_divergence"}),
] + [
    (name, trl, {"beta": 0.1, "f_divergence": divergence, "f_alpha": 0.3} | more)
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    for name, trl, more in (
        ("dpo", "sigmoid", {}),
        ("sigmoid_norm", "sigmoid_norm", {}),
        ("hinge", "hinge", {}),
        ("ipo", "ipo", {}),
        ("exo_pair", "exo_pair", {"label_smoothing": 0.1}),
        ("robust", "robust", {"label_smoothing": 0.1}),
        ("discopop", "discopop", {"tau": 0.05}),
    )
]

# (prompt, chosen, rejected), in numbers of words: lengths differ within and between the pairs.
WORDS = [(3, 5, 2), (6, 1, 9), (2, 12, 12), (9, 4, 7), (4, 7, 3), (1, 2, 15)]


def rows() -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(7)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(60, (count,), generator=generator).tolist())

    keys = ("prompt", "chosen", "rejected")
    # The leading blank keeps a prompt's last word apart from a response's first.
    return [{k: " " + words(n) for k, n in zip(keys, counts, strict=True)} for counts in WORDS]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def llama(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,  # large enough that policy and reference differ by some nats
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval()


def score(model, ids, attention_mask, scored) -> list[float]:
    """Sums of token log-probabilities over the `scored` positions, from the plain logits."""
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention_mask).logits.double()
    taken = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (taken * scored[:, 1:]).sum(1).tolist()


def collision(model, ids, attention_mask, scored) -> list[float]:
    """Sums over the `scored` positions of the log of the sum of all squared probabilities."""
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention_mask).logits.double()
    taken = logits[:, :-1].softmax(-1).square().sum(-1).log()
    return (taken * scored[:, 1:]).sum(1).tolist()


def shared(scored):
    """The `scored` positions within the length of the pair's shorter answer."""
    lengths = scored.sum(1)
    half = len(lengths) // 2  # all chosen, then all rejected
    shorter = torch.minimum(lengths[:half], lengths[half:]).repeat(2)
    return scored * (scored.cumsum(1) <= shorter[:, None])


def means(metrics: dict[str, list[float]]) -> dict[str, float]:
    wanted = ("rewards/", "logps/")
    return {k: v[-1] for k, v in metrics.items() if k.startswith(wanted)}


def arguments(kind, folder: str, **settings):
    return kind(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=64,
        **settings,
    )


def dpo_cases(folder: str) -> list[dict]:
    policy, reference = llama(1), llama(2)
    cases = []
    for form, loss_type, settings in DPO_FORMS:
        trainer = dpo_trainer(folder, policy, reference, form, loss_type, settings)

        def loss_of(examples, trainer=trainer) -> float:
            batch = trainer.data_collator(examples)
            return trainer.compute_loss(trainer.model, batch).item()

        examples = [trainer.train_dataset[i] for i in range(len(WORDS))]
        each = [loss_of([example]) for example in examples]
        loss = loss_of(examples)
        metrics = means(trainer._metrics["eval"])
        logps = dpo_logps(policy, reference, trainer.data_collator(examples), form)
        case = {"trl": f"DPOTrainer, loss_type={loss_type}", "name": form, "settings": settings}
        # A batch of one means the sft loss by that example's own tokens: no part of the batch's.
        losses = {} if "sft" in form else {"losses": each}
        cases.append(case | {"logps": logps, "loss": loss, "metrics": metrics} | losses)
    return cases


def dpo_trainer(folder: str, policy, reference, form: str, loss_type, settings: dict):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    theirs = {NAMES.get(key, key): value for key, value in settings.items()}
    if "*" in form:
        theirs["loss_weights"] = [float(part.split("*")[0]) for part in form.split("+")]
    if form == "wpo":
        theirs["use_weighting"] = True
    trainer = DPOTrainer(
        model=deepcopy(policy),
        ref_model=deepcopy(reference),
        args=arguments(DPOConfig, folder, loss_type=loss_type, **theirs),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer(),
    )
    trainer.model.eval()
    return trainer


def dpo_logps(policy, reference, batch, form: str) -> dict[str, dict[str, list[float]]]:
    """The log-probabilities and lengths that a form of the loss depends on, by role."""
    args = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    logps = {
        "policy": by_role(score(policy, *args)),
        "reference": by_role(score(reference, *args)),
        "lengths": by_role(batch["completion_mask"].sum(1).tolist()),
    }
    if form == "wpo":
        logps["collision"] = by_role(collision(policy, *args))
    if form == "ld_dpo":
        for name, model in (("policy", policy), ("reference", reference)):
            logps[f"shared_{name}"] = by_role(score(model, *args[:2], shared(args[2])))
    return logps


def simpo_cases(folder: str) -> list[dict]:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy = llama(1)
    cases = []
    for settings in ({"beta": 0.1, "gamma": 0.5}, {"beta": 2.5, "gamma": 1.4}):
        trainer = CPOTrainer(
            model=deepcopy(policy),
            args=arguments(
                CPOConfig,
                folder,
                loss_type="simpo",
                cpo_alpha=0.0,
                beta=settings["beta"],
                simpo_gamma=settings["gamma"],
            ),
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer(),
        )
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(WORDS))])
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        averages = trainer.concatenated_forward(trainer.model, batch)[:2]
        losses, *_ = trainer.cpo_loss(*averages)
        logps = {"policy": {}, "reference": {}, "lengths": {}}
        for role in ("chosen", "rejected"):
            scored = batch[f"{role}_labels"] != -100
            ids, mask = batch[f"{role}_input_ids"], batch[f"{role}_attention_mask"]
            logps["policy"][role] = score(policy, ids, mask, scored)
            logps["reference"][role] = [0.0] * len(WORDS)
            logps["lengths"][role] = scored.sum(1).tolist()
        # CPO logs averages under logps/..., DPO sums; ours are sums.
        metrics = {k: v for k, v in metrics.items() if k.startswith("rewards/")}
        cases.append(
            {
                "trl": "experimental CPOTrainer, loss_type=simpo, cpo_alpha=0",
                "name": "simpo",
                "settings": settings,
                "logps": logps,
                "loss": loss.item(),
                "losses": losses.tolist(),
                "metrics": metrics,
            }
        )
    return cases


def by_role(values: list[float]) -> dict[str, list[float]]:
    half = len(values) // 2  # a TRL batch is all chosen, then all rejected
    return {"chosen": values[:half], "rejected": values[half:]}


def old_cases() -> list[dict]:
    from trl.experimental.xpo.xpo_trainer import XPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer, FDivergenceType

    generator = torch.Generator().manual_seed(3)
    tokens = -3 * torch.rand(2, 2, 8, 12, generator=generator)  # model, sample, example, token
    (policy_a, policy_b), (reference_a, reference_b) = tokens.sum(-1)
    lengths = [12] * 8
    cases = []

    for settings in ({"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.5, "label_smoothing": 0.4}):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu"),
            reference_free=False,
            f_divergence_type=FDivergenceType.REVERSE_KL,
            **settings,
        )
        losses, chosen, rejected = DPOTrainer.dpo_loss(
            trainer, policy_a, policy_b, reference_a, reference_b, "sigmoid"
        )
        cases.append(
            {
                "trl": "DPOTrainer.dpo_loss, loss_type=sigmoid with label_smoothing",
                "name": "cdpo",
                "settings": settings,
                "logps": {
                    "policy": {"chosen": policy_a.tolist(), "rejected": policy_b.tolist()},
                    "reference": {"chosen": reference_a.tolist(), "rejected": reference_b.tolist()},
                    "lengths": {"chosen": lengths, "rejected": lengths},
                },
                "loss": losses.mean().item(),
                "losses": losses.tolist(),
                "metrics": {
                    "rewards/chosen": chosen.mean().item(),
                    "rewards/rejected": rejected.mean().item(),
                },
            }
        )

    # XPO: a is the policy's own sample, b the reference's; the judge prefers either.
    a_wins = torch.tensor([True, False, True, True, False, False, True, False])
    chosen_first = [
        (torch.where(a_wins, a, b).tolist(), torch.where(a_wins, b, a).tolist(), b.tolist())
        for a, b in ((policy_a, policy_b), (reference_a, reference_b))
    ]
    roles = ("chosen", "rejected", "explore")
    for settings in ({"beta": 0.1, "alpha": 1e-5}, {"beta": 0.3, "alpha": 0.02}):
        trainer = SimpleNamespace(args=SimpleNamespace(loss_type="sigmoid"), **settings)
        (policy_on_a, policy_on_b), (reference_on_a, reference_on_b) = tokens
        loss, dpo, xpo = XPOTrainer._compute_losses(
            trainer, policy_on_a, policy_on_b, reference_on_b, reference_on_a, a_wins
        )
        cases.append(
            {
                "trl": "experimental XPOTrainer._compute_losses",
                "name": "xpo",
                "settings": settings,
                "logps": {
                    "policy": dict(zip(roles, chosen_first[0], strict=True)),
                    "reference": dict(zip(roles, chosen_first[1], strict=True)),
                    "lengths": dict.fromkeys(roles, lengths),
                },
                "loss": loss.item(),
                "losses": (dpo + xpo).tolist(),
                "metrics": {"loss/dpo": dpo.mean().item(), "loss/xpo": xpo.mean().item()},
            }
        )
    return cases


def main() -> None:
    trl = version("trl")
    if trl == "1.16.0":
        with tempfile.TemporaryDirectory() as folder:
            cases = dpo_cases(folder) + simpo_cases(folder)
    elif trl == "0.28.0":
        cases = old_cases()
    else:
        sys.exit(f"found TRL {trl}; this script knows 1.16.0 and 0.28.0 (see its first lines)")
    recorded = json.loads(PATH.read_text()) if PATH.exists() else {}
    packages = ("trl", "torch", "transformers", "accelerate", "datasets")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    recorded[f"trl {trl}"] = {"versions": versions, "cases": cases}
    recorded = dict(sorted(recorded.items()))
    PATH.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{PATH.name}: {len(cases)} cases of TRL {trl}")


if __name__ == "__main__":
    main()
