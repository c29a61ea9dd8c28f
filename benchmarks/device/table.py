"""Makes the table of `device.sh` from what has been measured so far.

usage: table.py OUT [ended PART STATUS SECONDS LIMIT]

`ended` first notes how a part ended.
"""

from __future__ import annotations

import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from selm_jax.models import flops
from selm_jax.models.config import DecoderConfig, LayerKind, Rope

STATUS = {0: "ended", 3: "left out: torch or trl is missing", 124: "reached its time limit"}


def main(out: str, *ended: str) -> None:
    folder = Path(out)
    file = folder / "results.jsonl"
    if ended:
        _, name, status, seconds, limit = ended
        said = STATUS.get(int(status), f"failed with status {status}, see log.txt")
        line = {"what": "part", "name": name, "said": said, "seconds": seconds, "limit": limit}
        with file.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(f"   {name}: {said} after {seconds} s")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    at = folder / "work.json"
    work = json.loads(at.read_text()) if at.exists() else None
    (folder / "table.md").write_text(table(lines, work))


def table(lines: list[dict], work: dict | None) -> str:
    """The whole page, in Markdown."""
    train = [row for x in lines if x["what"] == "train" for row in [_train(x, work)]]
    decode = [_decode(x) for x in lines if x["what"] == "decode"]
    parts = [
        [x["name"], x["said"], f"{x['seconds']} of {x['limit']}"]
        for x in lines
        if x["what"] == "part"
    ]
    updates = (
        "Updates, full fine-tuning. MFU: useful operations (no padding, no masked scores, no "
        "recomputation) over the device's peak."
    )
    decoding = (
        "Decoding. `of the limit`: the time in which the device can read the weights and the live "
        "keys and values, over the measured time."
    )
    return "\n\n".join(
        [
            _device(lines, work),
            updates,
            _markdown(
                ("shape", "rows of", "by", "examples/s", "tokens/s", "MFU", "s/update"), train
            ),
            decoding,
            _markdown(
                ("shape", "room for", "slots", "tokens/s", "ms/step", "of the limit"), decode
            ),
            _markdown(("part", "", "seconds"), parts),
            "",
        ]
    )


def _device(lines: list[dict], work: dict | None) -> str:
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    for line in lines:
        versions |= line.get("versions", {})
    named = ", ".join(f"{k} {v}" for k, v in versions.items())
    if work is None:
        return f"Device unknown: its part failed. {named}."
    d = work["device"]
    known = [
        f"{d[key]:g} {unit}"
        for key, unit in (("peak_tflops", "bfloat16 TFLOP/s"), ("bandwidth_gb", "GB/s"))
        if d[key] is not None
    ]
    limits = ", ".join(known) or "limits measured around each step"
    rehearsal = " **A rehearsal on CPU: the figures mean nothing.**" * (d["platform"] == "cpu")
    return f"Device: {d['kind']} ({limits}). {named}.{rehearsal}"


def _train(line: dict, work: dict | None) -> list[str]:
    head = [line["shape"], f"{line['row_length']:,}", line["by"]]
    if "error" in line:
        return [*head, line["error"], "", "", ""]
    seconds = statistics.median(line["seconds"])
    if line["by"] == "selm_jax":
        tokens = line["tokens_per_second"]["useful"]
        return [*head, *_rates(line["examples_per_second"], tokens, line["mfu"], seconds)]
    assert work is not None  # TRL reads it too
    pairs = [e[:3] for e in work["examples"][str(line["row_length"])]]
    tokens = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in pairs)
    peak = work["device"]["peak_tflops"]
    operations = _pair_operations(work["shapes"][line["shape"]], pairs)
    mfu = operations / (1e12 * peak * seconds) if peak else None
    return [*head, *_rates(len(pairs) / seconds, tokens / seconds, mfu, seconds)]


def _rates(examples: float, tokens: float, mfu: float | None, seconds: float) -> list[str]:
    return [f"{examples:.3g}", f"{tokens:,.0f}", _percent(mfu), f"{seconds:.3g}"]


def _pair_operations(facts: dict, pairs: list[list[int]]) -> int:
    """Forward and backward passes over prompt + chosen and prompt + rejected, apart."""
    f = facts
    config = DecoderConfig(
        f["vocab_size"], f["hidden_size"], f["num_attention_heads"], f["num_key_value_heads"],
        f["head_dim"], f["intermediate_size"], (LayerKind(Rope(1e4)),) * f["num_hidden_layers"],
        1e-5, f["tie_word_embeddings"], f["max_position_embeddings"], "LlamaForCausalLM",
    )  # fmt: skip
    texts = [(prompt, r) for prompt, *both in pairs for r in both]
    return 3 * sum(
        flops.passed(config, tokens=p + r, pairs=flops.visible_pairs(p + r), scored=r).total
        for p, r in texts
    )


def _decode(line: dict) -> list[str]:
    head = [line["shape"], f"{line['capacity']:,}", str(line["slots"])]
    if "error" in line:
        return [*head, line["error"], "", ""]
    d = line["decode"]
    share = _percent(d["share_of_bandwidth"])
    return [*head, f"{d['tokens_per_second']:,.0f}", f"{d['ms_per_step']:.3g}", share]


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _markdown(heads: tuple[str, ...], body: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
