"""The tokenizer of a model folder: the ids of its tokenizer.json, whatever its other files say.

transformers rebuilds a tokenizer from the class that tokenizer_config.json names, and which ids come
out depends on its version. Here tokenizer.json alone decides: its normalizer, its added tokens, its
post-processor. Of tokenizer_config.json (and special_tokens_map.json) the names of BOS, EOS and the
other special tokens are read, and the chat template. transformers is asked only about a folder that
has older files in its place. No code of a folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from selm_jax.shell import json_file

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"

_ALWAYS = ("bos_token", "eos_token")  # a template that writes one must write one token


class ChatError(ValueError):
    """Text that does not become unambiguous token ids, or a folder that does not say how."""


class Tokenizer:
    """Texts to ids and back.

    Attributes:
      folder: the model folder.
      special: the special tokens that tokenizer_config.json names, such as `bos_token`.
    """

    def __init__(self, folder: Path):
        """Raises ChatError: there is no tokenizer, a file is damaged, or code is wanted."""
        self.folder = Path(folder)
        self.backend = read_backend(self.folder)
        self.special = _special_tokens(self.folder, self.backend)

    @property
    def bos_token(self) -> str | None:
        return self.special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """Id -> token, of those that are found in a text before anything else is."""
        return self.backend.get_added_tokens_decoder()

    @property
    def all_special_tokens(self) -> list[str]:
        """The added tokens that are special, and those with a name."""
        marked = [t.content for t in self.added_tokens_decoder.values() if t.special]
        return list(dict.fromkeys([*marked, *self.special.values()]))

    @property
    def chat_template(self) -> str | None:
        found = find_chat_template(self.folder)
        return None if found is None else found[1]

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with what the tokenizer puts around any text, or without."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as e:
            raise ChatError(f"no text that can be encoded (a lone surrogate?): {text!r}") from e

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; spaces stay as the tokens have them."""
        ids = [ids] if isinstance(ids, int) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self.backend.id_to_token(i) or f"<{i}>" for i in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def beyond(self, vocabulary: int) -> tuple[list[str], list[str]]:
        """Tokens without a row in an embedding of this size: (ordinary ones, added ones)."""
        added = {i: token.content for i, token in self.added_tokens_decoder.items()}
        if max(len(self), *added, 0) < vocabulary:  # the usual case, without reading all names
            return [], []
        over = {i: token for token, i in self.backend.get_vocab().items() if i >= vocabulary}
        over |= {i: token for i, token in added.items() if i >= vocabulary}
        ordinary = [token for i, token in sorted(over.items()) if i not in added]
        return ordinary, [token for i, token in sorted(over.items()) if i in added]

    def digest(self) -> str:
        """SHA-256 of all that the ids depend on."""
        file = self.folder / FILE
        sha = hashlib.sha256(
            file.read_bytes() if file.is_file() else self.backend.to_str().encode()
        )
        sha.update(json.dumps(self.special, sort_keys=True).encode())
        return sha.hexdigest()

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.backend.token_to_id(token)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """The folder's tokenizer.json, or what older files say in its place; it neither cuts nor pads.

    Raises:
      ChatError: it is missing or damaged, or tokenizer_config.json names code of the folder.
    """
    folder = Path(folder)
    refuse_code(folder)
    backend = _from_file(folder / FILE) if (folder / FILE).is_file() else _from_older_files(folder)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_file(file: Path) -> tokenizers.Tokenizer:
    refuse_pointer(file)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises this class itself
        raise ChatError(
            f"{file} is not a tokenizer that can be read ({e}). Take the file anew from where the "
            "model comes from"
        ) from e


def _from_older_files(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer that transformers makes of vocab.json and merges.txt, tokenizer.model, or the like.

    Raises:
      ChatError: there are no such files, or transformers makes nothing of them.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer  # here, because it takes seconds and is seldom needed

    reason = "nor any older file with a vocabulary"
    try:
        made = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        # Without any of these files some classes are made all the same, with an empty vocabulary.
        if any((folder / name).is_file() for name in made.vocab_files_names.values()):
            return tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
    except Exception as e:  # noqa: BLE001 - whatever goes wrong there, this folder has no tokenizer
        reason = f"and transformers makes nothing of the folder's other files ({e})"
    raise ChatError(
        f"{folder}: no tokenizer there: no {FILE}, {reason}. Take {FILE} from where the model comes "
        "from, or write it once from a tokenizer of your own with its save_pretrained"
    )


def refuse_code(folder: Path) -> None:
    """Raises ChatError if tokenizer_config.json asks for Python code of the folder."""
    if code := read_object(folder / CONFIG).get("auto_map"):
        raise ChatError(
            f"{folder / CONFIG}: auto_map names Python code of the folder ({json.dumps(code)}), "
            f"which is never run here. If {FILE} is all that the tokenizer needs, remove auto_map "
            "from the file; if not, take another model"
        )


def refuse_pointer(file: Path) -> None:
    """Raises ChatError for what `git clone` leaves in place of a large file."""
    if json_file.is_pointer(file):
        raise ChatError(f"{file} {json_file.POINTER}")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder; an empty one where there is no file.

    Raises:
      ChatError: the file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        return json_file.read_object(file)
    except json_file.JsonFileError as e:
        raise ChatError(str(e)) from e


def find_chat_template(folder: Path) -> tuple[str, str] | None:
    """(the file that has it, the template) of a model folder; None if there is no chat template.

    Of several templates with names it is the one called `default`. A file goes before what
    tokenizer_config.json says, as in transformers.

    Raises:
      ChatError: there are several templates, and none is called `default`.
    """
    folder = Path(folder)
    file = folder / "chat_template.jinja"
    if file.is_file():
        refuse_pointer(file)
        try:
            return str(file), file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as e:
            raise ChatError(f"{file} is not UTF-8 text: {e}. Save it as UTF-8") from e
    config = folder / CONFIG
    found = read_object(config).get("chat_template")
    others = {each.stem: "" for each in folder.glob("additional_chat_templates/*.jinja")}
    if found is None and not others:
        return None
    if isinstance(found, str):
        return str(config), found
    named = found or []
    if isinstance(named, list) and all(isinstance(each, dict) for each in named):
        named = {each.get("name"): each.get("template") for each in named}
    if not isinstance(named, dict) or not all(isinstance(t, str) for t in named.values()):
        raise ChatError(
            f"{config}: chat_template is neither a text nor a list of objects with name and template"
        )
    if "default" not in named:
        raise ChatError(
            f"{folder} has chat templates with the names {', '.join(map(str, [*named, *others]))}, "
            "and none called default, which is the one that is read. Save the one that you mean as "
            f"{file}"
        )
    return str(config), named["default"]


def _special_tokens(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Name -> token, of the names that end in `_token`, as far as tokenizer.json has the token."""
    config = read_object(folder / CONFIG)
    said: Mapping[str, Any] = config
    if "added_tokens_decoder" not in config:  # before that key, the other file had the last word
        said = config | read_object(folder / "special_tokens_map.json")
    special = {}
    for name, value in said.items():
        token = value.get("content") if isinstance(value, dict) else value
        if not name.endswith("_token") or not isinstance(token, str):
            continue
        if backend.token_to_id(token) is not None:
            special[name] = token
        elif name in _ALWAYS:
            raise ChatError(
                f"{folder / CONFIG} names {token!r} as {name}, but {folder / FILE} has no such "
                "token. Take both files from the same model"
            )
    return special
