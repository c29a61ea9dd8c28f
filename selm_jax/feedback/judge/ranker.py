"""A language model as the judge, behind any OpenAI-compatible server.

Three forms, each a way from answers to one score per candidate:

* `pairwise`: every two candidates are compared in both orders. A win counts 1, a tie 1/2; two
  orders that disagree are a tie. The score is the mean over all other candidates, from 0 to 1.
* `logprob`: as pairwise, but AlpacaEval 2's way: the judge answers with one token, and what counts
  is its probability (`judge_prompts.weighted_preference`). The two orders are averaged.
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

# The first name of each group is ours; the others are those of AlpacaEval's and MT-Bench's
# templates, which so can be used as they are.
_PROMPT = ("conversation", "prompt", "instruction", "question")
_ONE = ("response", "answer", "output")
_FIRST = ("response_a", "answer_a", "output_1")
_SECOND = ("response_b", "answer_b", "output_2")


class Form(NamedTuple):
    """How one kind of judge is asked and read.

    `read` gives a rating, or how far the first response won, from 0 to 1; None: malformed.
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
    # AlpacaEval 2's settings, one token and the five likeliest told, but for its temperature of 1:
    # vLLM tells the token that is drawn among the five, in place of the fifth likeliest. What it tells
    # are the probabilities before the temperature.
    "logprob": Form(LOGPROB, (_FIRST, _SECOND), _first_wins, 1, 0.0, 5),
}
_COUNTED = ("comparisons", "ratings", "malformed", "disagreements", "dropped")
MALFORMED = ("tie", "drop", "error")


@dataclass(frozen=True)
class JudgeRanker:
    """A judge as a ranker. Build it with `judge`.

    Attributes:
        client: asks the server; its cache and its budget last.
        form: a name of `FORMS`.
        template: with the placeholders of the form.
        sampling: of every request; see `Client.complete`.
        on_malformed: see `judge`.
        counts: `comparisons` or `ratings`, `malformed` answers, `disagreements` (comparisons
            whose two orders name different winners), `dropped` prompts; of the last `scores`.
        unread: which answer of the last `scores` was the first malformed one, and how it ends.
        watch: of all answers so far, and what stops a judge that is hardly ever understood.
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
        """One float64 array `[candidates]` per question; see `ranker.Ranker`.

        A score is NaN where the judge said nothing that could be read: of a rating that was not,
        of a response none of whose comparisons were, and with `on_malformed: drop` of all responses
        to a prompt one of whose comparisons was not.

        Raises:
            JudgeError: the server could not be asked, or (`on_malformed: error`) its answer not
                read, or most of its answers are not. Those that could be read are in the cache.
            BudgetExceeded: the budget is spent.
        """
        check_questions(self.name, questions, candidates)
        self.counts.clear()
        self.unread.clear()
        # Equal texts are judged once: the same request would be the same answer anyhow.
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
        """Counts of the last `scores`: the client's and the ranker's; `cost` if prices are set."""
        client = self.client
        report = client.counts.as_dict() | {key: self.counts[key] for key in _COUNTED}
        if client.budget.priced:
            tokens = Usage(client.counts.prompt_tokens, client.counts.completion_tokens)
            report["cost"] = client.budget.cost_of(tokens)
        return report

    def _asks(self, texts: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The responses of each request for one prompt: single ones, or pairs in both orders."""
        return itertools.permutations(texts, len(FORMS[self.form].responses))

    async def _values(
        self, questions: Sequence[Question], texts: Sequence[Sequence[str]]
    ) -> list[float | None]:
        """What each request's answer says, in the order of the requests; None: malformed."""
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
            about = f"that to prompt {ids[index]!r}: {ends}"
            if not self.unread:
                self.unread.append(about)
            if self.on_malformed == "error":
                raise JudgeError(
                    f"ranker {self.name!r}, prompt {ids[index]!r}: the judge's answer says nothing "
                    f"that can be read: {ends}. Change the template, or set on_malformed."
                )
            self.watch.add(about)
            return None

        async with self.client as client:
            return await client.complete_all(
                conversations(), read=read, usable=usable, **self.sampling
            )

    def _end_of(self, answer: Completion) -> str:
        """How an answer that could not be read ends, and what it lacks, in words."""
        lacks = ""
        if self.form == "logprob" and not answer.logprobs:
            lacks = (
                ", without log-probabilities; a server that sends no `logprobs` with `top_logprobs` "
                "has to be asked with form: pairwise"
            )
        return f"{answer.text[-200:]!r} (finish: {answer.finish}{lacks})"

    def _wins(
        self, asked: Sequence[float | None], candidates: Sequence[int]
    ) -> Float[np.ndarray, " candidates"]:
        """Mean wins; `asked` goes over ordered pairs of texts, `candidates` says whose text."""
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
        if count < 2:  # nothing was asked: one response, or several that are the same
            return np.full(len(candidates), 0.5)
        of_each = won[np.ix_(candidates, candidates)]
        scores = (of_each.sum(1) - 0.5) / (len(candidates) - 1)  # but for itself
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
    """A judge behind an OpenAI-compatible server.

    Args:
        model: the name the server knows the judge by.
        form: `pairwise`, `pointwise` or `logprob`; see the top of this file.
        base_url, key_env, concurrency, timeout, retries, backoff: see `judge_client.Client`.
        template: path of a text file in place of the form's own template; see `Template.parse`.
            Placeholders: {conversation} or {prompt} (the last user turn), and {response}, or
            {response_a} and {response_b}; AlpacaEval's and MT-Bench's names work too. Pairwise
            answers must say [[A]], [[B]], [[tie]] or [[C]] (a tie), pointwise ones such as [[7]],
            logprob ones m (the first) or M.
        on_malformed: what an answer that says nothing readable does. `tie`: its comparison is a
            tie beside those of the response that could be read (the default; not for pointwise);
            a response without any has no score. `drop`: no candidate of the prompt that was
            compared has a score; of those that were rated, those that could be read have (the
            default for pointwise). `error`: stops. A prompt one of whose candidates has no score
            gives no pair.
        max_tokens, temperature: of the judge's answer; 1024 and 0 by default, 1 and 0 for logprob.
        extra: more fields of the request's body; see `Client.complete`.
        cache: file of the paid answers; by default `judge.sqlite` in the cache folder of selm_jax.
        max_total_tokens, max_cost, price_prompt, price_completion: see `judge_budget.Budget`.

    Raises:
        JudgeError: a setting that cannot be used; a template without its placeholders.
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
            f"{', and not tie: a rating is no comparison' if pointwise else ''}."
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
    """The prompt alone, or all turns, each under its role."""
    if len(question.messages) < 2:
        return question.prompt
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in question.messages)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs to the end; in a notebook, whose thread runs a loop already, in another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
