"""BPE of SentencePiece and Gemma 4 in a GGUF file, by definition: the best pair first, leftmost."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from selm_jax.weights.gguf import GGUFError, convert
from selm_jax.weights.gguf_file import Fields, open_gguf
from selm_jax.weights.gguf_tokenizer import build_tokenizer

MARKS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = {"▁": -5.0, "h": -6.0, "e": -7.0, "he": -1.0, "▁h": -2.0, "eh": -0.5, "▁▁": -3.0}
KINDS = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
KINDS += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * 7
OWN = [int(kind) for kind in KINDS[:-1]] + [int(TokenType.USER_DEFINED)]


def keys(**own) -> dict:
    found = {
        "model": "llama",
        "tokens": MARKS + BYTES + list(PIECES),
        "scores": [0.0] * 259 + list(PIECES.values()),
        "token_type": [int(kind) for kind in KINDS],
    } | own
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_gguf):
    base, drop = tmp_path_factory.mktemp("spm"), ("tokenizer.ggml.add_bos_token",)
    return convert(tiny_gguf(base / "m.gguf", change=keys(), drop=drop), base / "out")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def by_definition(text: str, scores: dict[str, float] = PIECES, first: str = "▁") -> list[str]:
    """The tokens of a text."""
    symbols = list(first + text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        known = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
        if not known:
            break
        _, i = min(known)
        symbols[i : i + 2] = [pairs[i]]
    return [
        token
        for symbol in symbols
        for token in ([symbol] if symbol in scores else [f"<0x{b:02X}>" for b in symbol.encode()])
    ]


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="he hehé\n", max_size=12))
def test_the_pair_with_the_best_score_is_merged_first(tokenizer, text):
    found = tokenizer.encode(text)
    assert found.tokens == ["<s>", *(by_definition(text) if text else [])]
    assert tokenizer.decode(found.ids) == text


# The rank of a merge as a score; those with the lowest are not merged from others.
GEMMA4 = {"▁": -9.0, "h": -9.0, "e": -9.0, "\n": -9.0, "▁h": -1.0, "he": -2.0, "\n\n": -3.0}


def gemma4_keys(**own) -> dict:
    merges = {"merges": ["▁ h", "h e", "\n \n"], "add_space_prefix": False}
    return keys(**({"model": "gemma4", "tokens": MARKS + BYTES + list(GEMMA4)} | merges | own))


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory, tiny_gguf):
    path = tiny_gguf(tmp_path_factory.mktemp("gemma4") / "m.gguf", change=gemma4_keys())
    return build_tokenizer(Fields(path, open_gguf(path)))


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="he hehé\n", max_size=12))
def test_gemma_4_merges_by_rank(gemma4, text):
    found = gemma4.encode(text)
    assert found.tokens == ["<s>", *(by_definition(text, GEMMA4, "") if text else [])]
    assert gemma4.decode(found.ids) == text


def test_marks_and_bos(tokenizer, folder):
    assert tokenizer.encode("h</s>").tokens == ["<s>", "▁h", "</s>"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True  # if the file does not say


def test_without_a_blank_in_front_and_with_a_token_of_blanks(tmp_path, tiny_gguf):
    change = keys(add_space_prefix=False, token_type=OWN)
    change |= {"tokenizer.ggml.add_bos_token": False}
    out = convert(tiny_gguf(tmp_path / "m.gguf", change=change), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("he h").tokens == ["he", "▁h"]
    # Such a token is looked for first, behind blanks that were replaced.
    assert tokenizer.encode("h  h   e").tokens == ["h", "▁▁", "h", "▁▁", "▁", "e"]
    assert tokenizer.decode(tokenizer.encode(" he  ").ids) == " he  "


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set, which is not"),
        ({"scores": [0.0] * 265}, "266 tokens, 265 scores and 1 unknown"),
        ({"token_type": [1] * 266}, "266 scores and 0 unknown"),
        ({"add_eos_token": True}, "add_eos_token is set"),
        ({"token_type": OWN}, "'▁▁' is user-defined and has a blank"),
    ],
)
def test_what_would_give_other_tokens_is_refused(tmp_path, tiny_gguf, own, message):
    path = tiny_gguf(tmp_path / "m.gguf", change=keys(**own))
    with pytest.raises(GGUFError, match=message):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"merges": ["▁ h", "h e"]}, r"do not make the token '\\n\\n' of line ends"),
        ({"add_space_prefix": True}, "add_space_prefix is set"),
        ({"merges": ["▁ e"]}, "merges, row 0: '▁ e' uses or makes a token"),
    ],
)
def test_a_tokenizer_like_gemma_4s_is_refused(tmp_path, tiny_gguf, own, message):
    path = tiny_gguf(tmp_path / "m.gguf", change=gemma4_keys(**own))
    with pytest.raises(GGUFError, match=message):
        build_tokenizer(Fields(path, open_gguf(path)))


def test_only_sentencepiece_has_blanks_in_its_tokens(tmp_path, tiny_gguf):
    """A byte-level BPE finds its own tokens in the text as it is, before NFC changes it."""
    fields = open_gguf(tiny_gguf(tmp_path / "m.gguf")).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    last = len(tokens) - 1
    change = {  # in place of the token that the last merge makes
        "tokenizer.ggml.tokens": [*tokens[:last], "▁é"],
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * last + OWN[-1:],
        "tokenizer.ggml.merges": merges[:-1],
    }
    path = tiny_gguf(tmp_path / "own.gguf", pre="qwen2", change=change)
    tokenizer = build_tokenizer(Fields(path, open_gguf(path)))
    assert last in tokenizer.encode("▁é").ids
    assert last not in tokenizer.encode("▁e\u0301").ids


def test_phi_3_reads_no_line_end_behind_its_marks(tmp_path, tiny_gguf):
    """As in its tokenizer.json. The file's other tensors and keys are not Phi-3's."""
    path = tiny_gguf(tmp_path / "m.gguf", change=keys() | {"general.architecture": "phi3"})
    tokenizer = build_tokenizer(Fields(path, open_gguf(path)))
    vocab = tokenizer.get_vocab()
    found = tokenizer.encode("</s>\n h", add_special_tokens=False).ids
    assert found == [vocab["</s>"], vocab["▁h"]]


@pytest.mark.parametrize(("prefix", "own"), [(True, ["<|user|>"]), (False, ["▁▁", "\n\n", "<t>"])])
def test_tokens_are_those_of_sentencepiece(tmp_path, tiny_gguf, prefix, own):
    package = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    pages = Path(__file__).parents[2] / "docs"
    text = "\n".join((pages / f"{name}.md").read_text() for name in ("models", "run", "memory"))
    (tmp_path / "text").write_text(text)
    package.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=900,
        model_type="bpe", byte_fallback=True, user_defined_symbols=own, minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=prefix, split_digits=True,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    model = package.SentencePieceProcessor(str(tmp_path / "m.model"))
    ids = range(model.get_piece_size())
    kinds = [
        TokenType.UNKNOWN if model.is_unknown(i)
        else TokenType.CONTROL if model.is_control(i)
        else TokenType.BYTE if model.is_byte(i)
        else TokenType.USER_DEFINED if model.id_to_piece(i) in own
        else TokenType.NORMAL
        for i in ids
    ]  # fmt: skip
    change = keys(
        tokens=[model.id_to_piece(i) for i in ids], scores=[model.get_score(i) for i in ids],
        token_type=[int(kind) for kind in kinds], add_space_prefix=prefix, add_bos_token=False,
    )  # fmt: skip
    path = tiny_gguf(tmp_path / "m.gguf", change=change)
    tokenizer = build_tokenizer(Fields(path, open_gguf(path)))
    draw = random.Random(0)
    starts = [draw.randrange(len(text)) for _ in range(300)]
    texts = [text[start : start + draw.randint(1, 200)] for start in starts]
    texts += ["".join(draw.choices("ab  \n\n\té日😀12<t>", k=20)) for _ in range(300)]
    for each in texts:
        found = tokenizer.encode(each).ids
        assert found == model.encode(each), each
        assert tokenizer.decode(found, skip_special_tokens=False) == each
