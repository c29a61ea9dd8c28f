"""A model's tokens beside its tokenizer's: which of them end a text, and which the model cannot read."""

from __future__ import annotations

from pathlib import Path

from selm_jax.text.tokenizer import CONFIG, ChatError, Tokenizer, read_object


def checked_vocabulary(tokenizer: Tokenizer, vocabulary: int | None) -> int | None:
    """The rows of the model's embedding, if some token has none there; None if all have one.

    Raises:
      ChatError: ordinary text may have such a token. Of an added token it is enough that no text
        has it: many models have a token for padding or images that their embedding does not know.
    """
    if vocabulary is None:
        return None
    ordinary, added = tokenizer.beyond(vocabulary)
    if ordinary:
        raise ChatError(
            f"{tokenizer.folder}: the tokenizer has {len(tokenizer)} tokens, the model's embedding "
            f"only {vocabulary}; {ordinary[0]!r} is an ordinary one without a row there. Take "
            "tokenizer and model from the same place"
        )
    return vocabulary if added else None


def stop_ids(folder: Path, tokenizer: Tokenizer, vocabulary: int | None = None) -> tuple[int, ...]:
    """Tokens that end a text, from the generation config (where there is none, the model's, as
    transformers does) and the tokenizer.

    Raises:
      ChatError: there are none, or one is no token of the model.
    """
    files = (folder / name for name in ("generation_config.json", "config.json"))
    file = next((file for file in files if file.exists()), None)
    configured = read_object(file).get("eos_token_id") if file else None
    ids = configured if isinstance(configured, list) else [configured]
    most = len(tokenizer) if vocabulary is None else vocabulary
    named = [(each, f"{file}: eos_token_id") for each in ids]
    named.append((tokenizer.eos_token_id, f"{folder / CONFIG}: eos_token {tokenizer.eos_token!r}"))
    for i, where in named:
        if i is not None and (type(i) is not int or not 0 <= i < most):
            raise ChatError(
                f"{where} has {i!r}; a token's id, from 0 to {most - 1}, was expected. Name the "
                "token that ends an answer, or none"
            )
    stops = {i for i, _ in named if i is not None}
    if not stops:
        raise ChatError(f"{folder}: neither the generation config nor the tokenizer has an EOS")
    return tuple(sorted(stops))
