"""Runs the language model evaluation harness (lm-eval) on this package's models.

The harness needs three things: log-likelihoods of continuations, log-likelihoods of whole texts,
and generated texts that end at given strings. Tokens, truncation and stops are those of its own
`HFLM`, so that scores are comparable; only the computation is ours. All continuations of a context
share a packed row with it, so a question with four choices is read once, not four times.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.cost import Cost
from selm_jax.policy.policy import Policy, named_by_text
from selm_jax.preferences.examples import Example, Ids
from selm_jax.rollout.sampling import Sampling
from selm_jax.shell.progress import Advance
from selm_jax.text.conversations import Message

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise EvaluationError(
        f"lm-eval is not installed ({error}). Run pip install 'selm_jax[lm-eval]'"
    ) from error

_NEW_TOKENS = 256  # HFLM's default for tasks that do not set it
Bar = Callable[[str, int, str], AbstractContextManager[Advance]]


def no_bar(_title: str, _total: int, _unit: str) -> AbstractContextManager[Advance]:
    return nullcontext(lambda items, tokens=0: None)


class Harness(TemplateLM):
    """Adapts a model to the harness's interface.

    Args:
      bar: makes a progress bar from its title, its total and its unit (`shell.progress.bar`).
    """

    def __init__(self, model: Policy, seed: int = 0, bar: Bar = no_bar):
        super().__init__()
        self.model, self.seed, self._bar = model, seed, bar
        self.tokenizer = model.tokenizer

    # Tokens, like HFLM's

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise EvaluationError(
                f"{self.model.name}: its tokenizer has no EOS token, which the harness needs. Set "
                "eos_token in tokenizer_config.json"
            )
        return eos

    @property
    def prefix_token_id(self) -> int:
        """The id of the token that precedes a text without context: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.config.max_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Encodes a text with the tokenizer's special tokens, but never with a second BOS."""
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            settings = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **settings)

    # Chat

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Formats a chat with the model's chat template.

        The template must not refuse or drop a system message.
        """
        messages = [Message(m["role"], m["content"]) for m in chat_history]
        if add_generation_prompt:
            return self.model.chat.render(messages, answer_follows=True)
        return self.model.chat.continued(messages)

    # Log-likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood, and whether greedy decoding would produce it."""
        by_context: dict[Ids, dict[Ids, list[int]]] = {}  # context -> continuation -> requests
        for i, (_, context, continuation) in enumerate(requests):
            before, after = self._fitted(tuple(context), tuple(continuation))
            by_context.setdefault(before, {}).setdefault(after, []).append(i)
        examples = [Example(str(i), c, tuple(r), {}) for i, (c, r) in enumerate(by_context.items())]
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for responses, found in zip(by_context.values(), self._scored(examples), strict=True):
            for which, answer in zip(responses.values(), found, strict=True):
                for i in which:
                    out[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return out

    def _fitted(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """Cuts the context from the left so that context and continuation fit the model.

        The model never reads the last token of the continuation, so that token needs no room.
        """
        if not continuation or len(continuation) > self.max_length:
            raise EvaluationError(
                f"a continuation has {len(continuation)} tokens; expected from 1 to "
                f"{self.max_length} (max_position_embeddings). Leave this task out, or use a model "
                "for longer texts"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _scored(self, examples: Sequence[Example]) -> list[list[tuple[float, bool]]]:
        with self._bar("log-likelihoods", len(examples), "contexts") as advance:
            found = self.model.statistics(examples, advance)
        return [
            [(float(r.logprob.sum(dtype=float)), bool(r.likeliest.all())) for r in e] for e in found
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; windows of the model's length score each token once."""
        windows, counts = [], []
        for request in requests:
            (string,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(string), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            mine = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += mine
            counts.append(len(mine))
        values = iter(self._loglikelihood_tokens(windows))
        out = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    # Generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Generates texts up to the first stop string (excluded), batched by equal settings."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        out = [""] * len(requests)
        for settings, members in groups.items():
            prompts, limit, until, sampling = self._asked(
                [requests[i].args[0] for i in members], json.loads(settings)
            )
            for i, text in zip(members, self._texts(prompts, limit, until, sampling), strict=True):
                out[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return out

    def _asked(
        self, contexts: Sequence[str], settings: dict[str, Any]
    ) -> tuple[list[Ids], int, list[str], Sampling | None]:
        """Converts requests to prompt ids, token limit, stop strings, and sampling settings.

        Raises:
          EvaluationError: this engine does not support a setting. To ignore it would change the
            benchmark.
        """
        kwargs = _normalised(settings)
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until"), eos=eos)
        limit = kwargs.pop("max_gen_toks")
        temperature = float(kwargs.pop("temperature", 1.0))
        drawn = kwargs.pop("do_sample") and temperature > 0
        filters = {key: kwargs.pop(key) for key in ("top_k", "top_p", "min_p") if key in kwargs}
        if kwargs:
            raise EvaluationError(
                f"a task's generation_kwargs contain {', '.join(sorted(kwargs))}, which this "
                "engine does not support. It supports until, max_gen_toks, do_sample, temperature, "
                "top_k, top_p and min_p"
            )
        room = self.max_length - limit
        if room < 1:
            raise EvaluationError(
                f"a task needs up to {limit} new tokens, but the model supports only "
                f"{self.max_length} in all (max_position_embeddings). Lower the task's max_gen_toks"
            )
        prompts = [tuple(self.tok_encode(context)[-room:]) for context in contexts]
        return prompts, limit, until, Sampling(temperature, **filters) if drawn else None

    def _texts(
        self, prompts: list[Ids], limit: int, until: list[str], sampling: Sampling | None
    ) -> list[str]:
        def ended(ids: Ids) -> bool:
            text = self.tokenizer.decode(list(ids))  # a stop may be or contain a special token
            return any(end in text for end in until if end)

        with self._bar("generate", len(prompts), "texts") as advance:
            responses = self.model.answer(
                named_by_text(
                    prompts, greedy=int(sampling is None), samples=int(sampling is not None)
                ),
                max_new_tokens=limit, sampling=sampling or Sampling(), seed=self.seed,
                progress=advance, ended=ended, also_stop=self._special(until),
            )  # fmt: skip
        out = []
        for response in responses:
            # HFLM generates nothing after a stop string. The engine may have, and the text, which
            # is decoded without special tokens, does not always show where the stop was.
            ends = range(1, len(response.tokens) + 1)
            first = bisect.bisect_left(ends, True, key=lambda n: ended(response.tokens[:n]))
            kept = list(response.tokens[: first + 1])
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            out.append(postprocess_generated_text(text, until, None))
        return out

    def _special(self, until: Sequence[str]) -> Ids:
        """The ids of the stop strings that are special tokens; generation stops at them."""
        added = self.tokenizer.added_tokens_decoder.items()
        return tuple(i for i, token in added if token.special and token.content in until)


def _normalised(settings: dict[str, Any]) -> dict[str, Any]:
    """Parses a task's generation_kwargs like the harness; `until: null` means no stop strings.

    Raises:
      EvaluationError: the number of new tokens is below 1, or a stop string is not a string.
    """
    until = settings.get("until") or []
    ends = [end for end in (until if isinstance(until, list) else [until]) if end is not None]
    where = f"a task's generation_kwargs are {json.dumps(settings)}"
    if odd := [end for end in ends if not isinstance(end, str)]:
        raise EvaluationError(f"{where}: until has {odd[0]!r}; expected strings, or null for none")
    try:
        found: dict[str, Any] = dict(normalize_gen_kwargs(settings | {"until": ends}, _NEW_TOKENS))
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"{where}: {error}. Expected numbers; correct the task's file"
        ) from error
    if found["max_gen_toks"] < 1:
        raise EvaluationError(
            f"{where}: max_gen_toks is {found['max_gen_toks']}; expected 1 new token or more. "
            "Correct the task's file"
        )
    return found


class Counter(Harness):
    """A harness that counts the cost of all requests without running the model (`--dry-run`)."""

    def __init__(self, model: Policy):
        super().__init__(model)
        self.cost = Cost(model.name)

    def _add(self, **more: int) -> None:
        totals = {key: getattr(self.cost, key) + n for key, n in more.items()}
        self.cost = dataclasses.replace(self.cost, **totals)

    def _scored(self, examples: Sequence[Example]) -> list[list[tuple[float, bool]]]:
        self._add(scored_tokens=sum(e.tokens for e in examples))
        return [[(0.0, False)] * len(e.responses) for e in examples]

    def _texts(
        self, prompts: list[Ids], limit: int, until: list[str], sampling: Sampling | None
    ) -> list[str]:
        read = sum(map(len, prompts))
        self._add(answers=len(prompts), prompt_tokens=read, new_tokens=limit * len(prompts))
        return [""] * len(prompts)


def evaluated(
    harness: Harness, tasks: list[Any], manager: TaskManager, *, chat: bool, **how: Any
) -> dict[str, Any]:
    """Runs loaded tasks on a model, with the harness's seed; returns lm-eval's results.

    There are none in a process whose LOCAL_RANK, which torchrun sets, is not 0.

    Args:
      tasks: see `load_tasks`.
      chat: apply the chat template, with shots as earlier turns.
      how: further arguments of lm-eval's `simple_evaluate`; `system` is its `system_instruction`.
    """
    evaluate: Any = simple_evaluate  # its decorator hides its parameters from type checkers
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed")
    found = evaluate(
        harness, tasks=tasks, task_manager=manager, apply_chat_template=chat,
        fewshot_as_multiturn=chat, system_instruction=how.pop("system", None),
        **dict.fromkeys(seeds, harness.seed), **how,
    )  # fmt: skip
    return dict(found or {})
