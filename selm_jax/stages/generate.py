"""The stage `generate`: writes the policy's answers (responses/part-*.parquet)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selm_jax.config import Rollout, SamplingSettings, as_dict
from selm_jax.models.decoder import Params
from selm_jax.parallel import multihost
from selm_jax.rollout.remote import Server, named
from selm_jax.rollout.requests import Request, Response
from selm_jax.run.inputs import Model
from selm_jax.run.rows import prompt_ids
from selm_jax.shell import artifacts, parts
from selm_jax.shell.mirror import SERVER_LOG
from selm_jax.stages.settings import TEMPLATE
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step, counting
from selm_jax.tables import responses as table
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt

Advance = Callable[[int, int], None]  # called with the responses and tokens since the last call
Write = Callable[[Sequence[Response]], None]
# Answers the requests of a part, which has this number, and writes the answers.
Answer = Callable[[int, Sequence[Request], Write], None]


@stage(
    leaves=("responses",),
    settings=(
        *("seed", "candidates.greedy", "candidates.samples", "rollout"),
        *("training.parameter_dtype", "compute.dtype", *TEMPLATE),
    ),
    goes_on_from=("responses",),
)
def generate(
    step: Step, policy: Model, prompts: list[Prompt], chat: Chat, reference: Model | None = None
) -> Counts:
    """Generates the policy's answers to the prompts, part by part.

    If the experiment trains on the data's answers and needs none from the policy, the parts are
    empty and no model is loaded.

    Args:
      reference: the second model of `rollout.mixture`; None if the policy alone answers.
    """
    size = step.settings.rollout.prompts_per_part
    files = parts.files(step.folder / "responses", -(-len(prompts) // size))
    there = multihost.on_first(lambda: [parts.is_there(file) for file in files])
    wanted = step.settings.candidates
    sampling = _sampling(step.settings.rollout)
    each = wanted.greedy + wanted.samples
    with (
        step.bar(len(prompts) * each, "responses") as advance,
        _by_server(step, policy, advance)
        if each and step.settings.rollout.remote
        else _here(step, policy, reference, advance) as answer,
    ):
        for part, file in enumerate(files):
            mine = range(part * size, min((part + 1) * size, len(prompts)))
            if there[part]:
                advance(len(mine) * each, 0)
                continue
            requests = [
                Request(i, prompt_ids(chat, prompts[i]), wanted.greedy, wanted.samples)
                for i in mine
            ]

            def write(found: Sequence[Response], to: Path = file) -> None:
                rows = [response_row(chat, prompts[r.index], r) for r in found]
                table.write(to, rows, sampling)

            answer(part, requests, write)
    multihost.barrier()
    artifacts.wait_for(files)
    spelled = sum(any(chat.spelled.find(m.content) for m in p.messages) for p in prompts)
    answers = [(len(row.token_ids), row.finish) for file in files for row in table.read(file)]
    return {
        "prompts": len(prompts),
        "responses": len(answers),
        "tokens": sum(tokens for tokens, _ in answers),
        "cut_off": sum(finish == "length" for _, finish in answers),
        **({"prompts_spell_control_tokens": spelled} if spelled else {}),
    }


def _sampling(settings: Rollout) -> dict[str, Any]:
    """How samples are drawn, to be stored with them."""
    names = [*(each.name for each in dataclasses.fields(SamplingSettings)), "filter"]
    if settings.mixture is not None:
        names.append("mixture")
    return {name: as_dict(settings)[name] for name in names}


@contextlib.contextmanager
def _here(step: Step, policy: Model, reference: Model | None, advance: Advance) -> Iterator[Answer]:
    """Generates with the built-in engine; each process gets all answers and writes its parts."""
    params, progress = None, counting(advance)  # a stop loses the current part only
    engine = step.programs.engine
    if reference is None:
        engine = dataclasses.replace(engine, mixture=None)

    def load(model: Model) -> Params:
        return step.programs.decoding(step.programs.load(model.path))

    def answer(part: int, requests: Sequence[Request], write: Write) -> None:
        nonlocal params
        if params is None and any(request.wanted() for request in requests):
            params = load(policy) if reference is None else (load(policy), load(reference))
        found: Sequence[Response] = ()
        if params is not None:
            found = engine.generate(
                params, requests, seed=step.settings.seed, iteration=step.t, progress=progress
            )
        if part % multihost.count() == multihost.index():
            write(found)

    yield answer


@contextlib.contextmanager
def _by_server(step: Step, policy: Model, advance: Advance) -> Iterator[Answer]:
    """Generates with a server. The first process calls it, and starts it if the settings say so."""
    programs, engine = step.programs, step.programs.engine  # the engine that the server replaces
    settings = step.settings.rollout.remote
    assert settings is not None
    server = Server(
        settings,
        Path(multihost.on_first(lambda: str(named(policy.path)))),
        log=step.folder.parent / SERVER_LOG,
        sampling=engine.sampling,
        longest_prompt=programs.sizes.longest_prompt,
        max_new_tokens=engine.max_new_tokens,
        stop_ids=engine.stop_ids,
        vocabulary=programs.config.vocab_size,
        say=step.say,
    )
    with contextlib.ExitStack() as stack:
        entered: list[Any] = []

        def answer(part: int, requests: Sequence[Request], write: Write) -> None:  # noqa: ARG001
            def ask() -> None:
                if not entered:
                    entered.append(stack.enter_context(server))
                    step.note_server(server.version)
                seed = step.settings.seed
                write(entered[0].generate(requests, seed=seed, iteration=step.t, progress=advance))

            multihost.on_first(ask)
            multihost.stop_if_told()

        yield answer
    if server.tries.retries:
        step.say(f"{server.tries.retries:,} of {server.tries.requests:,} requests were sent again")


def response_row(chat: Chat, prompt: Prompt, response: Response) -> table.Row:
    """The table row of a response to a prompt, with the response's text."""
    kind = "greedy" if response.greedy else "sample"
    text = chat.text(response.tokens)
    drawn = None if response.greedy else response.sampled_logps
    return table.Row(
        prompt.id, response.sample, kind, tuple(response.tokens), text, response.finish,
        response.logps, drawn,
    )  # fmt: skip
