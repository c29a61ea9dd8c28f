"""Finds the tokens that end a text, and the tokens for which the model has no embedding."""

from __future__ import annotations

from pathlib import Path

from selm_jax.text.tokenizer import CONFIG, ChatError, Tokenizer, read_object


def checked_vocabulary(tokenizer: Tokenizer, vocabulary: int | None) -> int | None:
    """Returns `vocabulary` if an added token has no embedding, and None if all tokens have one.

    Many models have an added token without an embedding, for padding or images; this is fine as
    long as no text contains it.

    Raises:
      ChatError: if an ordinary token has no embedding.
    """
    if vocabulary is None:
        return None
    ordinary, added = tokenizer.beyond(vocabulary)
    if ordinary:
        raise ChatError(
            f"{tokenizer.folder}: the tokenizer has {len(tokenizer)} tokens, but the model's "
            f"embedding has only {vocabulary} rows; the ordinary token {ordinary[0]!r} has no row. "
            "Use the tokenizer that belongs to the model"
        )
    return vocabulary if added else None


def stop_ids(folder: Path, tokenizer: Tokenizer, vocabulary: int | None = None) -> tuple[int, ...]:
    """The ids of the tokens that end a text, from the generation config and the tokenizer.

    Without a generation config, config.json is read in its place, as in transformers, and with it
    what it says of the text model in a multi-modal one.

    Raises:
      ChatError: if there are no such tokens, or an id is not that of a token of the model.
    """
    files = (folder / name for name in ("generation_config.json", "config.json"))
    file = next((file for file in files if file.exists()), None)
    said = read_object(file) if file else {}
    if "eos_token_id" not in said and isinstance(text := said.get("text_config"), dict):
        said = text  # of a multi-modal model
    configured = said.get("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    most = len(tokenizer) if vocabulary is None else vocabulary
    named = [(each, f"{file}: eos_token_id") for each in ids]
    named.append((tokenizer.eos_token_id, f"{folder / CONFIG}: eos_token {tokenizer.eos_token!r}"))
    for i, where in named:
        if i is not None and (type(i) is not int or not 0 <= i < most):
            raise ChatError(
                f"{where} is {i!r}; expected the id of a token, from 0 to {most - 1}. Name the "
                "token that ends an answer, or remove the entry"
            )
    stops = {i for i, _ in named if i is not None}
    if not stops:
        raise ChatError(
            f"{folder}: neither the generation config nor the tokenizer has an EOS token. Set "
            "eos_token_id in generation_config.json"
        )
    return tuple(sorted(stops))
