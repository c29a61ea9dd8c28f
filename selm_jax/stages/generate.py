"""generate: the policy's answers, as token ids (responses/part-*.parquet)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selm_jax.parallel import multihost
from selm_jax.rollout.remote import Server, named
from selm_jax.rollout.requests import Request, Response
from selm_jax.run.run import Run
from selm_jax.shell import artifacts, parts
from selm_jax.tables import responses
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt

Counts = dict[str, Any]
Advance = Callable[[int, int], None]  # responses and tokens since the last call
Write = Callable[[Sequence[Response]], None]
# Answers the requests of a part, by its number, and writes them.
Answer = Callable[[int, Sequence[Request], Write], None]


def generate(run: Run, t: int) -> Counts:
    """The start policy of the iteration answers its prompts, part by part.

    Where no candidate is asked of it (an experiment that teaches the data's answers), the parts
    are empty and no model is loaded.
    """
    prompts = run.prompts(t)
    size = run.experiment.rollout.prompts_per_part
    files = response_files(run, t)
    there = multihost.on_first(lambda: [parts.is_there(file) for file in files])
    wanted = run.experiment.candidates
    each = wanted.greedy + wanted.samples
    by = _by_server if each and run.experiment.rollout.remote else _here
    bar = run.bar(f"iteration {t}  generate", len(prompts) * each, "responses")
    with bar as advance, by(run, t, advance) as answer:
        for part, file in enumerate(files):
            mine = range(part * size, min((part + 1) * size, len(prompts)))
            if there[part]:
                advance(len(mine) * each, 0)
                continue
            requests = [
                Request(i, run.data.prompt_ids(prompts[i]), wanted.greedy, wanted.samples)
                for i in mine
            ]

            def write(found: Sequence[Response], to: Path = file) -> None:
                responses.write(to, [_row(prompts[r.index], r, run.chat) for r in found])

            answer(part, requests, write)
    multihost.barrier()
    artifacts.wait_for(files)
    spelled = sum(any(run.chat.spelled.find(m.content) for m in p.messages) for p in prompts)
    counts = Counter[str]()
    for file in files:  # one at a time: together they may be large
        rows = responses.read(file)
        counts.update(
            responses=len(rows),
            tokens=sum(len(row.token_ids) for row in rows),
            cut_off=sum(row.finish == "length" for row in rows),
        )
    return {
        "prompts": len(prompts),
        **counts,
        **({"prompts_spell_control_tokens": spelled} if spelled else {}),
    }


@contextlib.contextmanager
def _here(run: Run, t: int, advance: Advance) -> Iterator[Answer]:
    """The engine here: every process knows all answers, and each writes its parts."""
    params = None

    def progress(responses: int, tokens: int) -> None:
        advance(responses, tokens)
        multihost.stop_if_told()  # the part is lost, the parts before it are not

    def answer(part: int, requests: Sequence[Request], write: Write) -> None:
        nonlocal params
        if params is None and any(request.wanted() for request in requests):
            params = run.programs.decoding(run.programs.load(run.policy(t - 1)))
        found: Sequence[Response] = ()
        if params is not None:
            found = run.programs.engine.generate(
                params, requests, seed=run.experiment.seed, iteration=t, progress=progress
            )
        if part % multihost.count() == multihost.index():
            write(found)

    yield answer


@contextlib.contextmanager
def _by_server(run: Run, t: int, advance: Advance) -> Iterator[Answer]:
    """A server that the first process asks, and starts if it is to; that process writes."""
    settings = run.experiment.rollout.remote
    engine = run.programs.engine  # the one that the server stands in for
    assert settings is not None
    policy = Server(
        settings,
        Path(multihost.on_first(lambda: str(named(run.policy(t - 1))))),
        log=run.folder.path / "server.log",
        sampling=engine.sampling,
        longest_prompt=run.programs.sizes.longest_prompt,
        max_new_tokens=engine.max_new_tokens,
        stop_ids=engine.stop_ids,
        vocabulary=run.programs.config.vocab_size,
        say=lambda text: run.console.print(f"iteration {t}  generate: {text}", soft_wrap=True),
    )
    with contextlib.ExitStack() as stack:
        server = None

        def answer(part: int, requests: Sequence[Request], write: Write) -> None:  # noqa: ARG001
            def ask() -> None:
                nonlocal server
                if server is None:
                    server = stack.enter_context(policy)
                    run.folder.note_server(t, server.version)
                seed = run.experiment.seed
                write(server.generate(requests, seed=seed, iteration=t, progress=advance))

            multihost.on_first(ask)
            multihost.stop_if_told()

        yield answer
    if policy.tries.retries:
        run.console.print(
            f"iteration {t}  generate: {policy.tries.retries:,} of {policy.tries.requests:,} requests "
            "were sent again",
            soft_wrap=True,
        )


def response_files(run: Run, t: int) -> list[Path]:
    """The parts of iteration t's responses; the same however many processes write them."""
    count = -(-len(run.prompts(t)) // run.experiment.rollout.prompts_per_part)
    return parts.files(run.folder.iteration(t) / "responses", count)


def _row(prompt: Prompt, r: Response, chat: Chat) -> responses.Row:
    text = chat.text(r.tokens)
    kind = "greedy" if r.greedy else "sample"
    return responses.Row(prompt.id, r.sample, kind, r.tokens, text, r.finish)
