"""`selm run EXPERIMENT --tiny`: makes an experiment small enough for any machine.

The experiment keeps its loss, iterations, portions, learning rates, layout and rules. What needs
weights, a data set or an accelerator is replaced: the model by a random one of its family (or of
SmolLM2's, if the name tells no other), the data by 64 made-up rows, and sizes by small ones.
Nothing is downloaded, and every replacement is printed. The inputs are the same bytes every time,
so a tiny run resumes like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from selm_jax.config import Compute, Data, Evaluation, Experiment, Feedback, as_dict
from selm_jax.config.heldout import HeldoutSet
from selm_jax.models.decoder import Decoder
from selm_jax.models.families import from_hf, to_hf
from selm_jax.parallel import multihost
from selm_jax.shell import artifacts
from selm_jax.shell.leftovers import INCOMING, sweep
from selm_jax.shell.paths import cache_root, claim
from selm_jax.shell.storage import is_url
from selm_jax.shell.user_code import is_user_code
from selm_jax.weights.huggingface import save

ROWS, HELDOUT = 64, 8


@dataclasses.dataclass(frozen=True)
class Family:
    """Holds what tells a model family apart: keys of config.json, special tokens, chat template.

    Attributes:
      model: the keys of config.json in which the family differs from the others.
      special: the tokenizer's special tokens; the first is BOS, the last ends an answer.
      eos: the tokenizer's end-of-text token. In some families another token ends an answer.
      adds_bos: whether the tokenizer puts BOS in front of any text.
      template: Jinja source of the chat template.
    """

    model: dict[str, Any]
    special: tuple[str, ...]
    eos: str
    adds_bos: bool
    template: str


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)

# By what stands in the model's name. The templates are written anew after the published ones
# (docs/models.md); Phi-3's is that of the paper's time, which began with BOS.
_FAMILIES = {
    ("zephyr", "mistral"): Family(
        {"model_type": "mistral", "sliding_window": 256, "rms_norm_eps": 1e-5},
        ("<s>", "</s>"), "</s>", True,
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    ("llama-3", "llama3"): Family(
        {"model_type": "llama", "rope_theta": 5e5, "rms_norm_eps": 1e-5},
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>",
         "<|eot_id|>"), "<|end_of_text|>", True,
        "{% for m in messages %}{{ bos_token if loop.first }}{{ '<|start_header_id|>' + m.role + "
        "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}",
    ),
    ("phi-3", "phi3"): Family(
        {"model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 256,
         "rms_norm_eps": 1e-5},
        ("<s>", "<|user|>", "<|assistant|>", "<|endoftext|>", "<|end|>"), "<|endoftext|>", True,
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + "
        "'<|end|>\n' }}{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt }}",
    ),
    ("qwen3-30b-a3b", "qwen3-235b-a22b"): Family(
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 64, "norm_topk_prob": True, "rms_norm_eps": 1e-6},
        ("<|im_start|>", "<|im_end|>"), "<|im_end|>", False, _CHATML,
    ),
    ("olmo-3", "olmo3"): Family(
        {"model_type": "olmo3", "sliding_window": 256, "rms_norm_eps": 1e-6},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", False, _CHATML,
    ),
    ("smollm",): Family(
        {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        ("<|im_start|>", "<|im_end|>"), "<|im_end|>", False, _CHATML,
    ),
}  # fmt: skip
_OTHERS = ("smollm",)  # what rehearses a model whose name tells no family
_SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip


def shrink(experiment: Experiment, console: Console) -> Experiment:
    """Makes an experiment tiny: writes a small model and data, and prints replaced settings.

    Args:
      experiment: its `output: X` becomes `output: X-tiny`, and its inputs are written there.

    Raises:
      PathError: the folder `X-tiny` holds files of another program.
    """
    e = experiment
    output = f"{e.output.rstrip('/')}-tiny"
    family = _family(e.model.source) or _FAMILIES[_OTHERS]

    if is_url(output):  # the processes have no folder in common
        inputs = _inputs_in(cache_root().absolute() / "tiny", family, e.data)
    else:
        inputs = Path(output) / "inputs"

        def write() -> None:
            claim(Path(output))
            _write_inputs(inputs, family, e.data)

        multihost.on_first(write)
        artifacts.wait_for([inputs])
    text = e.text
    if text.layout == "paper":  # in proportion: 1024 and 512 of its tokens
        text = replace(text, max_length=160, max_prompt_length=80)
    tiny = replace(
        e,
        output=output,
        model=replace(e.model, source=str(inputs / "model"), revision=None),
        data=replace(
            e.data, train=str(inputs / "train.jsonl"), train_split=None, heldout_split=None,
            heldout=str(inputs / "heldout.jsonl") if e.data.heldout else None,
            heldout_sets={
                n: HeldoutSet(str(inputs / "heldout.jsonl")) for n in e.data.heldout_sets
            },
            revision=None, limit=None, heldout_limit=None, skip=min(e.data.skip, ROWS // 4),
        ),
        text=text,
        rollout=replace(
            e.rollout, max_new_tokens=16, max_prompt_tokens=128, slots=8, prefill_rows=8,
            prompts_per_part=8, remote=None,  # a rehearsal needs no server
        ),
        feedback=_feedback(e.feedback),
        training=replace(
            e.training, global_batch=4, row_length=512, rows=_rows_of_devices(),
            checkpoint_every=2,
        ),
        evaluation=Evaluation(e.evaluation.samples),  # tasks would take longer than all the rest
        compute=Compute(dtype=e.compute.dtype),  # all devices there are
    )  # fmt: skip
    _say(e, tiny, console)
    return tiny


def _inputs_in(cache: Path, family: Family, data: Data) -> Path:
    """Writes the inputs into a folder named after their digest; so all processes name it alike."""
    cache.mkdir(parents=True, exist_ok=True)
    sweep(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=INCOMING) as work:
        made = Path(work, "inputs")
        _write_inputs(made, family, data)
        folder = cache / artifacts.digest(made)[:16]
        with contextlib.suppress(OSError):  # it is there, also if another process was faster
            os.rename(made, folder)
    return folder


def _write_inputs(folder: Path, family: Family, data: Data) -> None:
    with artifacts.whole(folder, replaces_folder=True) as partial:
        make_model(partial / "model", family)
        for name, count in (("train", ROWS), ("heldout", HELDOUT)):
            lines = (json.dumps(row) + "\n" for row in _rows(data, name, count))
            (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_model(folder: Path, family: Family) -> None:
    """Writes a random model of 2 layers and width 64, with a byte tokenizer, into `folder`."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(family)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, end = family.special[0], family.special[-1]
    names = {"bos_token": bos, "eos_token": family.eos, "pad_token": family.eos}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        | names,
    )
    (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    stops = sorted({cast(int, tokenizer.token_to_id(each)) for each in (family.eos, end)})
    _write_json(folder / "generation_config.json", {"eos_token_id": stops})
    config = from_hf(_SIZES | {"vocab_size": tokenizer.get_vocab_size()} | family.model)
    ids = {name: tokenizer.token_to_id(family.eos) for name in ("eos_token_id", "pad_token_id")}
    ids["bos_token_id"] = tokenizer.token_to_id(bos)
    _write_json(folder / "config.json", to_hf(config) | ids)
    two = jnp.zeros((1, 2), jnp.int32)
    variables = Decoder(config).init(jax.random.key(0), two, two)
    save(nn.unbox(variables["params"]), config, folder)


def _family(source: str) -> Family | None:
    """The family that a model's name tells; None if it tells none of those here."""
    own = source.rstrip("/").rpartition("/")[2].lower()  # without its organisation or folder
    if "smollm3" in own:  # not of SmolLM2's family
        return None
    for names, family in _FAMILIES.items():
        if any(name in own for name in names):
            return family
    return None


def _tokenizer(family: Family) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in family.special]
    )
    if family.adds_bos:
        bos = family.special[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


_VERBS = ("Draw", "Sell", "Sing", "Paint", "Praise", "Review", "Explain", "Describe", "Compare")
_THINGS = ("a river", "a chair", "a song", "a train", "soup", "my coat", "tea", "a garden")


def _rows(data: Data, split: str, count: int) -> Iterator[dict[str, Any]]:
    """Yields made-up dataset rows with the columns that the experiment's settings name."""
    first = 0 if split == "train" else ROWS  # none of the held-out prompts is trained on
    for i in range(first, first + count):
        verb, thing = _VERBS[i // len(_THINGS)], _THINGS[i % len(_THINGS)]
        prompt = f"{verb} {thing}."
        row: dict[str, Any] = {data.prompt_id: f"{split}-{i}", data.prompt: prompt}
        answers = {
            data.chosen: f"Gladly: {thing} is what I {verb.lower()} best.",
            data.rejected: f"No, {thing} bores me." if i % 3 else "No.",
        }
        for column, answer in answers.items():
            if column is not None:
                turns = (("user", prompt), ("assistant", answer))
                row[column] = [{"role": role, "content": content} for role, content in turns]
        numbers = ((data.chosen_score, 4.0), (data.rejected_score, 2.0), (data.bonus, 1.0))
        for column, score in numbers:
            if column is not None:
                row[column] = score
        yield row


def _feedback(feedback: Feedback) -> Feedback:
    """Replaces a ranker that needs weights, a server or real text by the ranker `length`.

    A user's own ranker stays, so that it is rehearsed. It may give all random letters the same
    score, so ties are kept.
    """
    if not _is_here(feedback.ranker, feedback.settings):
        return replace(feedback, ranker="length", settings={})
    return replace(feedback, ties="first") if is_user_code(feedback.ranker) else feedback


def _is_here(ranker: str, settings: Mapping[str, Any]) -> bool:
    """Returns whether a ranker (of a mixture, every part) works offline on the made-up rows."""
    if ranker in ("pairrm", "reward_model"):
        folder = settings.get("folder" if ranker == "pairrm" else "source", "")
        return (Path(str(folder)) / "config.json").exists()
    if ranker == "verifiable":
        return "instructions" in settings
    if ranker == "judge":
        host = urlsplit(str(settings.get("base_url", ""))).hostname
        return host in ("127.0.0.1", "localhost", "::1")
    if ranker == "mixture":
        parts = settings.get("parts")
        return not isinstance(parts, list) or all(  # what is no part, the mixture itself refuses
            _is_here(str(part.get("ranker")), part.get("settings") or {})
            for part in parts
            if isinstance(part, Mapping)
        )
    return ranker != "sentiment"  # to which all random letters are the same: no pair would be left


def _rows_of_devices() -> int:
    """A batch size of at least 8 rows that divides evenly over the devices."""
    devices = jax.device_count()
    return devices * -(-8 // devices)


def _say(before: Experiment, after: Experiment, console: Console) -> None:
    console.rule("TINY: a rehearsal whose numbers mean nothing", style="bold yellow")
    console.print(
        f"a random model and {ROWS} made-up rows replace the experiment's.", style="yellow"
    )
    if _family(before.model.source) is None:
        console.print(
            f"The name {before.model.source!r} tells no family that has a tiny model, so this one "
            "has SmolLM2's architecture and chat template.",
            style="yellow", soft_wrap=True, highlight=False,
        )  # fmt: skip
    console.print("Changed settings:", style="yellow")
    old, new = _flat(as_dict(before)), _flat(as_dict(after))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            console.print(
                f"  {key}: {old.get(key)} -> {new.get(key)}",
                style="yellow", soft_wrap=True, highlight=False,
            )  # fmt: skip
    console.rule(style="bold yellow")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
