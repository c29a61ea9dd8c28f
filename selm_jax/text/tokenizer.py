"""The tokenizer of a model folder, built from its tokenizer.json alone.

transformers rebuilds a tokenizer from the class that tokenizer_config.json names, so that the token
ids depend on the version of transformers. Here only tokenizer.json decides: its normalizer, its
added tokens, its post-processor. tokenizer_config.json (and special_tokens_map.json) give only the
names of BOS, EOS and other special tokens, and the chat template. transformers is used only for a
folder that has older files and no tokenizer.json. Code in a folder is never run.
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

_ALWAYS = ("bos_token", "eos_token")  # if a template writes one of these, it must be one token


class ChatError(ValueError):
    """A text has no unambiguous token ids, or the model folder lacks a file or token."""


class Tokenizer:
    """Converts texts to token ids and back.

    Attributes:
      folder: the model folder.
      special: name -> text of the special tokens in tokenizer_config.json, such as `bos_token`.
    """

    def __init__(self, folder: Path):
        """Reads the tokenizer files in the folder.

        Raises:
          ChatError: if there is no tokenizer, a file is damaged, or the tokenizer needs code.
        """
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
        """Maps ids to added tokens, which the tokenizer finds before it splits a text."""
        return self.backend.get_added_tokens_decoder()

    @property
    def all_special_tokens(self) -> list[str]:
        """The added tokens marked as special, and the named ones, such as `bos_token`."""
        marked = [t.content for t in self.added_tokens_decoder.values() if t.special]
        return list(dict.fromkeys([*marked, *self.special.values()]))

    @property
    def chat_template(self) -> str | None:
        found = find_chat_template(self.folder)
        return None if found is None else found[1]

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encodes a text, with or without the special tokens that the tokenizer adds."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as e:
            raise ChatError(
                f"this text cannot be encoded; remove halves of surrogate pairs from it: {text!r}"
            ) from e

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Decodes token ids without cleaning up spaces."""
        ids = [ids] if isinstance(ids, int) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self.backend.id_to_token(i) or f"<{i}>" for i in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def beyond(self, vocabulary: int) -> tuple[list[str], list[str]]:
        """Returns (ordinary, added) tokens for which an embedding of this size has no row."""
        added = {i: token.content for i, token in self.added_tokens_decoder.items()}
        if max(len(self), *added, 0) < vocabulary:  # the usual case, without reading all names
            return [], []
        over = {i: token for token, i in self.backend.get_vocab().items() if i >= vocabulary}
        over |= {i: token for i, token in added.items() if i >= vocabulary}
        ordinary = [token for i, token in sorted(over.items()) if i not in added]
        return ordinary, [token for i, token in sorted(over.items()) if i in added]

    def digest(self) -> str:
        """The SHA-256 of everything that token ids depend on."""
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
    """Reads tokenizer.json, or older files in its place, and turns off truncation and padding.

    Raises:
      ChatError: if it is missing or damaged, or tokenizer_config.json names code in the folder.
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
            f"{file} cannot be read as a tokenizer ({e}). Download the file again from the "
            "model's source"
        ) from e


def _from_older_files(folder: Path) -> tokenizers.Tokenizer:
    """Asks transformers to build the tokenizer from older files, such as vocab.json.

    Raises:
      ChatError: if there are no such files, or transformers cannot make a tokenizer of them.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer  # imported late: it takes seconds and is seldom needed

    reason = "and no older file with a vocabulary"
    try:
        made = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        # Even without these files some classes give a tokenizer, with an empty vocabulary.
        if any((folder / name).is_file() for name in made.vocab_files_names.values()):
            return tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
    except Exception as e:  # noqa: BLE001 - whatever goes wrong there, this folder has no tokenizer
        reason = f"and transformers cannot make a tokenizer of the other files ({e})"
    raise ChatError(
        f"{folder} has no tokenizer: no {FILE}, {reason}. Download {FILE} from the model's "
        "source, or write it from a tokenizer of your own with its save_pretrained"
    )


def refuse_code(folder: Path) -> None:
    """Raises ChatError if tokenizer_config.json names Python code in the folder."""
    if code := read_object(folder / CONFIG).get("auto_map"):
        raise ChatError(
            f"{folder / CONFIG}: auto_map names Python code in the folder ({json.dumps(code)}), "
            f"which is never run. If the tokenizer needs only {FILE}, remove auto_map from the "
            "file; otherwise use another model"
        )


def refuse_pointer(file: Path) -> None:
    """Raises ChatError for a Git LFS pointer, which `git clone` leaves in place of a large file."""
    if json_file.is_pointer(file):
        raise ChatError(f"{file} {json_file.POINTER}")


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a model folder; {} if there is no such file.

    Raises:
      ChatError: if the file does not contain a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        return json_file.read_object(file)
    except json_file.JsonFileError as e:
        raise ChatError(str(e)) from e


def find_chat_template(folder: Path) -> tuple[str, str] | None:
    """Finds the chat template of a model folder: (its file, the template); None if there is none.

    If there are several named templates, the one called `default` is used. As in transformers, a
    template in a file of its own takes precedence over tokenizer_config.json.

    Raises:
      ChatError: if there are several templates and none is called `default`.
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
            f"{config}: chat_template is neither a string nor a list of objects with the keys name "
            f"and template. Correct it, or save the template as {file}"
        )
    if "default" not in named:
        raise ChatError(
            f"{folder} has the chat templates {', '.join(map(str, [*named, *others]))}, but none "
            f"called default, which is the one that is used. Save the one that you want as {file}"
        )
    return str(config), named["default"]


def _special_tokens(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Maps names (`..._token`) of special tokens to their texts, if tokenizer.json has them."""
    config = read_object(folder / CONFIG)
    said: Mapping[str, Any] = config
    if "added_tokens_decoder" not in config:  # an older folder: the map takes precedence
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
                "token. Use both files of the same model"
            )
    return special
