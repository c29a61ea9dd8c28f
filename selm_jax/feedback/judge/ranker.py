"""A ranker that asks a language model (the judge) on any OpenAI-compatible server.

There are three forms of judging, each of which gives one score per candidate:

* `pairwise`: every two candidates are compared in both orders. A win counts 1, a tie 1/2; if the
  two orders disagree, the result is a tie. The score is the mean over all other candidates, from 0
  to 1.
* `logprob`: as pairwise, but as AlpacaEval 2 does it: the judge answers with one token, and the
  token's probability counts (`prompts.weighted_preference`). The two orders are averaged.
* `pointwise`: each candidate is rated alone; the score is the rating, from 1 to 10.

n candidates cost n (n - 1) requests in the first two forms and n in the third. Equal texts are a
tie without a request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Float64

from selm_jax.feedback.judge.answer import Completion, Usage
from selm_jax.feedback.judge.budget import Budget, JudgeError, Timeout, Tokens, check_numbers
from selm_jax.feedback.judge.client import Client, Messages
from selm_jax.feedback.judge.prompts import (
    LOGPROB,
    PAIRWISE,
    POINTWISE,
    Template,
    read_rating,
    read_verdict,
    weighted_preference,
)
from selm_jax.feedback.judge.unread import Unread
from selm_jax.feedback.ranker import Question, check_questions, check_scores
from selm_jax.shell.paths import place
from selm_jax.shell.ranges import Count, Natural, NonNegative
from selm_jax.shell.words import did_you_mean
from selm_jax.weights.sources import cache_root

T = TypeVar("T")

# The first name of each group is ours. The others are those of AlpacaEval and MT-Bench, so that
# their templates can be used unchanged.
_PROMPT = ("conversation", "prompt", "instruction", "question")
_ONE = ("response", "answer", "output")
_FIRST = ("response_a", "answer_a", "output_1")
_SECOND = ("response_b", "answer_b", "output_2")


class Form(NamedTuple):
    """The prompt, answer parser and sampling settings of one form of judging, such as `pairwise`.

    `read` returns a rating, or a number from 0 to 1 for how far the first response won, or None for
    a malformed answer.
    """

    template: str
    responses: tuple[tuple[str, ...], ...]  # placeholders of each response
    read: Callable[[Completion], float | None]
    max_tokens: int
    temperature: float
    top_logprobs: int | None = None


def _first_wins(answer: Completion) -> float | None:
    second = weighted_preference(answer)
    return None if second is None else 1 - second


FORMS: Mapping[str, Form] = {
    "pairwise": Form(PAIRWISE, (_FIRST, _SECOND), read_verdict, 1024, 0.0),
    "pointwise": Form(POINTWISE, (_ONE,), read_rating, 1024, 0.0),
    # AlpacaEval 2's settings, one token and five log-probabilities, except for its temperature of
    # 1: vLLM reports the sampled token among the five, in place of the fifth most likely one. The
    # probabilities it reports are those before the temperature.
    "logprob": Form(LOGPROB, (_FIRST, _SECOND), _first_wins, 1, 0.0, 5),
}
_COUNTED = ("comparisons", "ratings", "malformed", "disagreements", "dropped")
MALFORMED = ("tie", "drop", "error")


@dataclass(frozen=True)
class JudgeRanker:
    """A ranker that asks a language model (the judge) for scores. Build it with `judge`.

    Attributes:
        client: sends the requests; its cache and budget persist between calls of `scores`.
        form: a name in `FORMS`.
        template: the prompt, with the placeholders of the form.
        sampling: arguments for every request; see `Client.complete`.
        on_malformed: see `judge`.
        counts: counts of the last `scores`: `comparisons` or `ratings`, `malformed` answers,
            `disagreements` (comparisons whose two orders name different winners), and `dropped`
            prompts.
        unread: a description of the first malformed answer of the last `scores`.
        watch: counts all answers so far, and stops the run if most of them are malformed.
    """

    client: Client
    form: str
    template: Template
    sampling: Mapping[str, Any]
    on_malformed: str
    counts: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)
    watch: Unread = field(default_factory=lambda: Unread("ranker 'judge'"))
    name: str = "judge"

    @property
    def relative(self) -> bool:
        return self.form != "pointwise"

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Scores the candidates: one float64 array per question; see `ranker.Ranker`.

        A score is NaN if the judge's answers about it are malformed: the rating, or all comparisons
        of the response. With `on_malformed: drop`, one malformed comparison makes the scores of all
        responses to its prompt NaN.

        Raises:
            JudgeError: the server gave no answer, most answers are malformed, or (with
                `on_malformed: error`) one is. The readable answers are in the cache.
            BudgetExceeded: the budget is spent.
        """
        check_questions(self.name, questions, candidates)
        self.counts.clear()
        self.unread.clear()
        # Equal texts are judged once: the same request would have the same answer.
        texts = [list(dict.fromkeys(each)) for each in candidates]
        values = iter(_run(self._values(questions, texts)))
        found = []
        for each, unique in zip(candidates, texts, strict=True):
            asked = [next(values) for _ in self._asks(unique)]
            combine = self._ratings if self.form == "pointwise" else self._wins
            found.append(combine(asked, [unique.index(text) for text in each]))
        unread = [np.isnan(scores) for scores in found]
        self.counts["dropped"] = sum(map(bool, map(np.any, unread)))
        return check_scores(self.name, questions, candidates, found, unread)

    def report(self) -> dict[str, int | float]:
        """The counts of the last call of `scores`, with `cost` if prices are set."""
        client = self.client
        report = client.counts.as_dict() | {key: self.counts[key] for key in _COUNTED}
        if client.budget.priced:
            tokens = Usage(client.counts.prompt_tokens, client.counts.completion_tokens)
            report["cost"] = client.budget.cost_of(tokens)
        return report

    def _asks(self, texts: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Yields the responses to show in each request: one, or a pair in either order."""
        return itertools.permutations(texts, len(FORMS[self.form].responses))

    async def _values(
        self, questions: Sequence[Question], texts: Sequence[Sequence[str]]
    ) -> list[float | None]:
        """Asks the judge; returns each answer's parsed value, or None for a malformed answer."""
        ids = [q.id for q, each in zip(questions, texts, strict=True) for _ in self._asks(each)]

        def conversations() -> Iterator[Messages]:
            for question, each in zip(questions, texts, strict=True):
                about = dict.fromkeys(_PROMPT, question.prompt)
                about["conversation"] = _conversation(question)
                for responses in self._asks(each):
                    named = zip(FORMS[self.form].responses, responses, strict=True)
                    values = {name: text for names, text in named for name in names}
                    yield self.template.fill(about | values)

        def usable(answer: Completion) -> bool:
            return FORMS[self.form].read(answer) is not None

        def read(index: int, answer: Completion) -> float | None:
            value = FORMS[self.form].read(answer)
            if value is not None:
                self.watch.add(None)
                return value
            self.counts["malformed"] += 1
            ends = self._end_of(answer)
            about = f"the one to prompt {ids[index]!r}: {ends}"
            if not self.unread:
                self.unread.append(about)
            if self.on_malformed == "error":
                raise JudgeError(
                    f"ranker {self.name!r}, prompt {ids[index]!r}: the judge's answer has no "
                    f"verdict that can be read: {ends}. Change the template, or set on_malformed."
                )
            self.watch.add(about)
            return None

        async with self.client as client:
            return await client.complete_all(
                conversations(), read=read, usable=usable, **self.sampling
            )

    def _end_of(self, answer: Completion) -> str:
        """Describes a malformed answer for error messages: how it ends, and what is missing."""
        lacks = ""
        if self.form == "logprob" and not answer.logprobs:
            lacks = (
                ", without log-probabilities; use form: pairwise with a server that does not "
                "support `logprobs` and `top_logprobs`"
            )
        return f"{answer.text[-200:]!r} (finish: {answer.finish}{lacks})"

    def _wins(
        self, asked: Sequence[float | None], candidates: Sequence[int]
    ) -> Float[np.ndarray, " candidates"]:
        """Computes each candidate's mean win (0 to 1) from the verdicts on all ordered pairs.

        `candidates` has the index of each candidate's text.
        """
        count = max(candidates, default=-1) + 1
        first = dict(zip(itertools.permutations(range(count), 2), asked, strict=True))
        won, unread = np.full((count, count), 0.5), np.eye(count, dtype=bool)
        for i, j in itertools.combinations(range(count), 2):
            one, other = first[i, j], first[j, i]  # how far i won, how far j won
            self.counts["comparisons"] += 1
            if one is None or other is None:
                unread[i, j] = unread[j, i] = True
                continue
            disagree = np.sign(one - 0.5) != np.sign(0.5 - other)
            self.counts["disagreements"] += int(disagree)
            if self.form == "logprob":
                won[i, j] = (one + 1 - other) / 2
            elif not disagree:
                won[i, j] = one
            won[j, i] = 1 - won[i, j]
        if count < 2:  # no requests: one response, or several with the same text
            return np.full(len(candidates), 0.5)
        of_each = won[np.ix_(candidates, candidates)]
        scores = (of_each.sum(1) - 0.5) / (len(candidates) - 1)  # without itself
        if self.on_malformed == "drop" and unread.sum() > count:
            return np.full(len(candidates), np.nan)
        scores[np.take(unread.all(axis=1), candidates)] = np.nan
        return scores

    def _ratings(
        self, asked: Sequence[float | None], candidates: Sequence[int]
    ) -> Float[np.ndarray, " candidates"]:
        self.counts["ratings"] += len(asked)
        return np.array([asked[i] for i in candidates], dtype=np.float64)  # None becomes NaN


def judge(
    model: str,
    form: str = "pairwise",
    base_url: str | None = None,
    key_env: str | None = None,
    template: str | None = None,
    on_malformed: str | None = None,
    max_tokens: Count | None = None,
    temperature: NonNegative | None = None,
    extra: Mapping[str, Any] | None = None,
    concurrency: Count = 16,
    timeout: Timeout = 120.0,
    retries: Natural = 6,
    backoff: NonNegative = 1.0,
    cache: str | None = None,
    max_total_tokens: Tokens | None = None,
    max_cost: NonNegative | None = None,
    price_prompt: NonNegative | None = None,
    price_completion: NonNegative | None = None,
) -> JudgeRanker:
    """A judge on an OpenAI-compatible server.

    Args:
        model: the judge's name on the server.
        form: `pairwise`, `pointwise` or `logprob`; see the top of this file.
        base_url, key_env, concurrency, timeout, retries, backoff: see `client.Client`.
        template: path of a text file to use instead of the form's template; see `Template.parse`.
            Placeholders: {conversation} or {prompt} (the last user turn), and {response}, or
            {response_a} and {response_b}; AlpacaEval's and MT-Bench's names work too. The judge
            must answer [[A]], [[B]], [[tie]] or [[C]] (a tie) if pairwise, a number such as [[7]]
            if pointwise, and m (the first) or M if logprob.
        on_malformed: what to do with an answer that cannot be read. `tie` (the default; not for
            pointwise): the comparison is a tie; a response without any readable comparison has no
            score. `drop` (the default for pointwise): after a malformed comparison no candidate of
            the prompt has a score; a malformed rating leaves only its own candidate without one.
            `error`: stop. A prompt with a candidate that has no score gives no pair.
        max_tokens, temperature: of the judge's answer; by default 1024 and 0 (logprob: 1 and 0).
        extra: more fields of the request's body; see `Client.complete`.
        cache: file of the paid answers; by default `judge.sqlite` in the cache folder of selm_jax.
        max_total_tokens, max_cost, price_prompt, price_completion: see `budget.Budget`.

    Raises:
        JudgeError: a setting is invalid, or the template lacks a placeholder.
    """
    if form not in FORMS:
        raise JudgeError(
            f"judge: unknown form {form!r}{did_you_mean(str(form), FORMS)} Expected one of "
            f"{', '.join(FORMS)}."
        )
    pointwise = form == "pointwise"
    policy = on_malformed or ("drop" if pointwise else "tie")
    if policy not in MALFORMED or (pointwise and policy == "tie"):
        raise JudgeError(
            f"judge: on_malformed is {policy!r}; expected one of {', '.join(MALFORMED)}"
            f"{', but not tie: a rating is not a comparison' if pointwise else ''}."
        )
    facts = FORMS[form]
    sampling = {
        "max_tokens": facts.max_tokens if max_tokens is None else max_tokens,
        "temperature": facts.temperature if temperature is None else temperature,
        "top_logprobs": facts.top_logprobs,
        "extra": extra,
    }
    check_numbers(judge, sampling)
    client = Client(
        model,
        cache=place(cache) if cache else cache_root() / "judge.sqlite",
        base_url=base_url,
        key_env=key_env,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        budget=Budget(max_total_tokens, max_cost, price_prompt, price_completion),
    )
    return JudgeRanker(client, form, _template(template, facts), sampling, policy)


def _template(path: str | None, form: Form) -> Template:
    needs = (_PROMPT, *form.responses)
    if path is None:
        return Template.parse(form.template, needs, "the form's own template")
    try:
        text = place(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"judge: the template {path} cannot be read: {error}.") from error
    return Template.parse(text, needs, f"judge, template {path}")


def _conversation(question: Question) -> str:
    """The conversation as the judge sees it: a single prompt, or all messages with their roles."""
    if len(question.messages) < 2:
        return question.prompt
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in question.messages)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to completion; in a thread if an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
