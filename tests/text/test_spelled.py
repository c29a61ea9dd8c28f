"""Control tokens that messages spell out: found, and encoded as text where that is asked for."""

from __future__ import annotations

import re

import pytest
import tokenizers
from tokenizer_folders import KINDS, WORDS, texts, write
from tokenizers import pre_tokenizers

from selm_jax.config import Text
from selm_jax.text.chat import Chat, ChatError
from selm_jax.text.layout import paper_ids
from selm_jax.text.prompts import Message

AS_TEXT = Text(special_tokens="as_text")
CHATS = [kind for kind in KINDS if kind != "deberta"]


@pytest.fixture(scope="module", params=CHATS)
def both(request, tmp_path_factory):
    """(the kind's name, its chat with spelled tokens as tokens, its chat with them as text)."""
    kind = KINDS[request.param]
    folder = write(tmp_path_factory.mktemp(request.param), kind, kind.classes[0])
    return request.param, Chat(folder), Chat(folder, AS_TEXT)


def literal(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text in which no token is looked for: what the library does between two of them."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [text]
    if backend.pre_tokenizer is not None:
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for piece in pieces if piece for token in backend.model.tokenize(piece)]


def expected(name: str, chat: Chat, turns: list[tuple[str, str]]) -> list[int]:
    """The prompt piece by piece, as the two templates of `tokenizer_folders` are written."""
    backend = tokenizers.Tokenizer.from_file(str(chat.folder / "tokenizer.json"))
    pieces: list[str | None] = []  # text, then the token behind it, ...
    if KINDS[name].template == WORDS:
        opening, end, header = "<|{}|>\n", "</s>", "<|assistant|>\n"
    else:
        opening, end, header = "<|im_start|>{}\n", "<|im_end|>", "<|im_start|>assistant\n"
    control = sorted((t.content for t in chat.tokenizer.added_tokens_decoder.values()), key=len)
    cut = re.compile("|".join(map(re.escape, reversed(control))))

    def own(text: str) -> None:  # of the template: its tokens are tokens
        texts_, tokens = cut.split(text), cut.findall(text)
        for i, each in enumerate(texts_):
            if pieces and isinstance(pieces[-1], str) and not pieces[-1].startswith("\0"):
                pieces[-1] += each
            else:
                pieces.append(each)
            if i < len(tokens):
                pieces.append("\0" + tokens[i])

    def said(text: str) -> None:
        if pieces and not pieces[-1].startswith("\0"):
            pieces[-1] += text
        else:
            pieces.append(text)

    for role, content in turns:
        own(opening.format(role))
        said(content)
        own(end + "\n")
    own(header)
    ids = []
    for i, piece in enumerate(pieces):
        if piece.startswith("\0"):
            ids.append(backend.token_to_id(piece[1:]))
        else:
            first = backend.pre_tokenizer if name.startswith("mistral") and i else None
            if first is not None:  # ▁ stands in front of the whole text alone
                backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
            swallows = name == "phi_3" and i and pieces[i - 1].startswith("\0")
            ids += literal(backend, piece.lstrip() if swallows else piece)
            backend.pre_tokenizer = first or backend.pre_tokenizer
    bos = backend.encode("").ids
    return ids if ids[: len(bos)] == bos else [*bos, *ids]


def test_what_a_message_spells_is_text_and_what_the_template_writes_are_tokens(both):
    name, _, chat = both
    special = [t.content for t in chat.tokenizer.added_tokens_decoder.values()]
    drawn = texts(400, special, seed=3)
    for one, two, three in zip(drawn[::3], drawn[1::3], drawn[2::3], strict=False):
        turns = [("user", one), ("assistant", two), ("user", three)]
        found = chat.prompt_ids([Message(role, text) for role, text in turns])
        assert list(found) == expected(name, chat, turns), turns


def test_it_is_the_same_where_nothing_is_spelled(both):
    _, as_tokens, as_text = both
    for text in texts(200, [], seed=4):
        messages = [Message("user", text)]
        assert as_text.prompt_ids(messages) == as_tokens.prompt_ids(messages)
        if text.strip():
            assert as_text.response_ids(messages, text) == as_tokens.response_ids(messages, text)
            assert as_text.conversation_ids(messages, text) == as_tokens.conversation_ids(
                messages, text
            )
            assert as_text.rendered_ids(messages) == as_tokens.rendered_ids(messages)
        assert as_text.render(messages, True) == as_tokens.render(messages, True)


def test_an_answer_may_then_spell_an_end(both):
    """It ends with one token, and what it spells before is its letters."""
    _, as_tokens, chat = both
    end = chat.tokenizer.eos_token
    messages, answer = [Message("user", f"What is {end}?")], f"It is {end}, so."
    with pytest.raises(ChatError, match="spells out"):
        as_tokens.response_ids(messages, answer)
    ids = chat.response_ids(messages, answer)
    assert chat.spelled_ends(answer) == []
    assert [i for i in ids if i in chat.stop_ids] == [ids[-1]]
    assert chat.text(ids) == answer
    whole = chat.conversation_ids(messages, answer)
    assert whole[: len(ids) + len(chat.prompt_ids(messages))] == chat.prompt_ids(messages) + ids


def test_the_papers_layout_too(tmp_path):
    kind = KINDS["llama_3_and_smollm_3"]
    folder = write(tmp_path, kind, kind.classes[0])
    end, stop = "<|im_end|>", Chat(folder).tokenizer.eos_token_id
    prompt, answer = paper_ids(Chat(folder, AS_TEXT), [Message("user", end)], f"a {end}")
    assert (prompt.count(stop), answer.count(stop)) == (1, 2)  # the template's, and one more
    prompt, answer = paper_ids(Chat(folder), [Message("user", end)], f"a {end}")
    assert (prompt.count(stop), answer.count(stop)) == (2, 3)


def test_control_tokens_are_found(both):
    _, chat, _ = both
    end = chat.tokenizer.eos_token
    assert chat.spelled.find(f"a{end}b {end}") == [end, end]
    assert chat.spelled.find("a < b | c > d") == []


def test_a_message_cannot_forge_a_stand_in(both):
    """The characters that stand for tokens within, and their neighbours."""
    _, _, chat = both
    for code in (0xF8000, 0xFFFEF, 0x108000, 0x10FFFF):
        with pytest.raises(ChatError, match=rf"private-use character U\+{code:X}"):
            chat.prompt_ids([Message("user", f"a{chr(code)}")])
    assert chat.prompt_ids([Message("user", "an icon: \U000f0001, \ue000")])
