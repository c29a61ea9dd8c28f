"""Only tokenizer.json determines token ids, and code in a model folder is never run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizer_folders import KINDS, texts, write

from selm_jax.feedback.models.pairrm_inputs import read_backend as pairrm_backend
from selm_jax.text.chat import Chat, ChatError, Message
from selm_jax.text.tokenizer import Tokenizer

CLASSES = [(kind, name) for kind, made in KINDS.items() for name in made.classes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(kind, class)`, or one of its own if it has other keys in tokenizer_config.json."""
    made: dict[tuple[str, str], Path] = {}

    def of(kind: str, name: str = "PreTrainedTokenizerFast", **config) -> Path:
        if config or (kind, name) not in made:
            path = write(tmp_path_factory.mktemp(kind) / name, KINDS[kind], name, **config)
            if config:
                return path
            made[kind, name] = path
        return made[kind, name]

    return of


# --- the ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_ids_are_those_of_tokenizer_json(kind, name, folder):
    """On 10,000 texts for each kind, with and without what the post-processor adds."""
    path = folder(kind, name)
    right = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    special = [t.content for t in right.get_added_tokens_decoder().values()]
    drawn = texts(10_000 // len(KINDS[kind].classes) + 1, special, seed=len(name))
    ours = Tokenizer(path)
    for around in (True, False):
        expected = [e.ids for e in right.encode_batch(drawn, add_special_tokens=around)]
        found = [ours.encode(text, add_special_tokens=around) for text in drawn]
        differ = [t for t, a, b in zip(drawn, found, expected, strict=True) if a != b]
        assert not differ, f"{len(differ)} of {len(drawn)}, such as {differ[0]!r}"
    assert len(ours) == right.get_vocab_size()


@pytest.mark.parametrize(("kind", "name"), [c for c in CLASSES if c[0] != "deberta"])
def test_a_conversation_has_those_ids_too(kind, name, folder):
    """The ids of the rendered text, with BOS in front."""
    path = folder(kind, name)
    chat = Chat(path)
    right = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in texts(200, [], seed=1):
        messages = [Message("user", text)]
        rendered = chat.render(messages, answer_follows=True)
        expected = right.encode(rendered).ids
        if expected[:2] == [expected[0]] * 2 and expected[0] == chat.tokenizer.bos_token_id:
            expected = expected[1:]
        assert list(chat.prompt_ids(messages)) == expected


def test_what_the_file_cuts_or_pads_is_not_cut_or_padded(folder):
    """Fine-tuned models often come with the length of their training."""
    path = folder("smollm", model_max_length=4)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(path / "tokenizer.json"))
    assert len(Tokenizer(path).encode("abcdefgh ijk")) > 9
    assert len(Tokenizer(path).encode("a")) == 1


def test_text_of_ids_keeps_its_spaces(folder):
    """tokenizer_config.json may ask to clean them up: `It 's` would become `It's`."""
    ours = Tokenizer(folder("llama_3_and_smollm_3"))
    assert ours.decode(ours.encode("It 's , so .", add_special_tokens=False)) == "It 's , so ."


def test_pairrm_reads_the_same_file(folder):
    for name in KINDS["deberta"].classes:
        path = folder("deberta", name)
        right = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        drawn = texts(500, ["[SEP]"], seed=2)
        expected = [e.ids for e in right.encode_batch(drawn)]
        assert [e.ids for e in pairrm_backend(path).encode_batch(drawn)] == expected


# --- the names of special tokens ---------------------------------------------------------------


def test_names_are_those_of_the_config_or_before_its_last_form_of_the_map(folder):
    path = folder("llama_2", eos_token={"content": "</s>", "special": True})
    assert (Tokenizer(path).bos_token_id, Tokenizer(path).eos_token_id) == (1, 2)
    (path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<unk>"}}')
    assert Tokenizer(path).eos_token == "<unk>"
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {}}))
    assert Tokenizer(path).eos_token == "</s>"


def test_a_name_of_a_token_that_the_file_has_not(folder):
    """It would become one more token than the embedding has rows."""
    assert Tokenizer(folder("llama_2", pad_token="[PAD]")).pad_token_id is None
    with pytest.raises(ChatError, match=r"tokenizer_config\.json names '<end>' as eos_token"):
        Tokenizer(folder("llama_2", eos_token="<end>"))


# --- no code -----------------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("use", ["Chat", "Tokenizer", "read_backend"])
def test_code_of_a_folder_is_refused_and_nobody_is_asked(use, folder, tmp_path):
    """It is refused even if every question is answered with yes."""
    path = folder("smollm", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    (path / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "ran")))
    module = "chat" if use == "Chat" else "tokenizer"
    code = (
        f"from pathlib import Path; from selm_jax.text.{module} import {use}; "
        f"{use}(Path({str(path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="y\n" * 9, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and not done.stdout
    assert f"{path / 'tokenizer_config.json'}: auto_map names Python code" in done.stderr
    assert not (tmp_path / "ran").exists() and not list(path.glob("__pycache__"))


# --- files that are not what they should be ----------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

BEGINS_WITH_A_BYTE = r"generation_config\.json begins with a byte"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", POINTER, r"tokenizer\.json is a Git LFS pointer(.|\n)*git lfs pull"),
        ("tokenizer.json", "{}", r"tokenizer\.json cannot be read as a tokenizer"),
        ("tokenizer.json", None, r"has no tokenizer: no tokenizer\.json(.|\n)*save_pretrained"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "[]", r"_config\.json contains a list; expected an object"),
        ("chat_template.jinja", b"\xff{{ a }}", r"chat_template\.jinja is not UTF-8"),
        ("generation_config.json", "eos: 1", r"generation_config\.json is not JSON"),
        ("generation_config.json", b"\xef\xbb\xbf{}", BEGINS_WITH_A_BYTE),
        ("generation_config.json", b"\xff\xfe{\0}\0", BEGINS_WITH_A_BYTE),
        ("generation_config.json", "[" * 99_999, r"generation_config\.json is not JSON"),
        *(
            (
                "generation_config.json",
                json.dumps({"eos_token_id": each}),
                rf"eos_token_id is {said};",
            )
            for each, said in (
                *((-1, "-1"), (9999, "9999"), ([1, "2"], "'2'"), (1.5, "1.5"), (True, "True")),
            )
        ),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(file, content, message, folder):
    path = folder("smollm", name := "PreTrainedTokenizerFast", fresh=name)
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ChatError, match=message):
        Chat(path)


def test_older_files_serve_in_place_of_tokenizer_json(folder):
    pytest.importorskip("transformers")
    path = folder("smollm", name := "GPT2Tokenizer", fresh=name)
    whole = Tokenizer(path)
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    older = Tokenizer(path)
    assert older.decode(older.encode("the  end 123")) == "the  end 123"
    assert older.backend.get_vocab_size() >= len(model["vocab"]) > 256
    assert older.special == whole.special and older.digest() != whole.digest()
    assert older.encode("the") == whole.encode("the")


def test_named_templates(folder):
    def of(templates) -> Chat:
        path = folder("smollm", chat_template=templates)
        (path / "chat_template.jinja").unlink()
        return Chat(path)

    two = [{"name": "rag", "template": "x"}, {"name": "default", "template": "{{ bos_token }}"}]
    assert of(two).render([Message("user", "a")], True) == "<|im_start|>"
    for templates in (two[:1], {"rag": "x"}):
        with pytest.raises(ChatError, match="has the chat templates rag, but none called default"):
            of(templates)
    with pytest.raises(ChatError, match="chat_template is neither a string"):
        of([1])


# --- tokens that the embedding does not have ---------------------------------------------------


def test_an_added_token_beyond_the_embedding_is_refused_where_it_appears(folder):
    """For example `[PAD]`, whose id in many fine-tuned models is beyond their embedding."""
    path = folder("llama_2", fresh=True)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rows = backend.get_vocab_size()
    backend.add_special_tokens(["[PAD]"])
    backend.save(str(path / "tokenizer.json"))
    chat = Chat(path, vocabulary=rows)
    assert max(chat.prompt_ids([Message("user", "Hi [PAD")])) < rows
    assert max(chat.response_ids([Message("user", "Hi")], "[PAD")) < rows
    for ask in (
        lambda: chat.prompt_ids([Message("user", "Hi [PAD]")]),
        lambda: chat.response_ids([Message("user", "Hi")], "so [PAD]"),
        lambda: chat.conversation_ids([Message("user", "Hi")], "so [PAD]"),
        lambda: chat.rendered_ids([Message("user", "Hi [PAD]")]),
    ):
        with pytest.raises(
            ChatError, match=rf"\[PAD\](.|\n)*with id {rows}, but the model's embedding"
        ):
            ask()
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "[PAD]"}))
    with pytest.raises(ChatError, match=rf"eos_token .*{rows}"):  # every answer would end with it
        Chat(path, vocabulary=rows)


def test_ordinary_tokens_beyond_the_embedding_are_refused_at_once(folder):
    path = folder("llama_2")
    with pytest.raises(ChatError, match="has no row"):
        Chat(path, vocabulary=len(Tokenizer(path)) - 1)
