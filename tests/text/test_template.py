"""Chat templates render as in transformers, within limits on time and memory."""

from __future__ import annotations

import datetime
import os
import signal
import time
from pathlib import Path

import pytest

from selm_jax.text import template
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Message
from selm_jax.text.template import Refused, Template
from selm_jax.text.tokenizer import ChatError

DAY = datetime.date(2024, 7, 5)
FILES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
USER = [{"role": "user", "content": " a \n<b> é"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nb "},
    {"role": "user", "content": "c"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
)


def of(source: str, **variables) -> Template:
    return Template(source, "chat_template.jinja", variables, DAY)


def ours(source: str, messages, answer_follows: bool, **variables) -> str | None:
    """None if the template refuses the conversation."""
    try:
        return of(source, **variables).render(messages, answer_follows)
    except Refused:
        return None


def theirs(source: str, messages, answer_follows: bool, **variables) -> str | None:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    settings = {"chat_template": source, "add_generation_prompt": answer_follows, **variables}
    try:
        return render_jinja_template([messages], **settings)[0][0]
    except jinja2.TemplateError:
        return None


class Day:
    @staticmethod
    def now() -> datetime.datetime:
        return datetime.datetime.combine(DAY, datetime.time())


# --- what is rendered --------------------------------------------------------------------------

PIECES = [
    "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}",
    (
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n"
        "{{ m.role }}\n{% endfor %}"
    ),
    (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}"
    ),
    "{{ strftime_now('%d %B %Y, %H:%M') }}",
    "{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}{{ nothing }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}.",
    "{% macro say(m) %}[{{ m.content | trim }}]{% endmacro %}{{ say(messages[0]) }}{{ dict(a=1) }}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}",
    "{{ raise_exception('No.') if messages | length > 1 else 'yes' }}",
    "a\n  {% if true %}\n b\n{% endif %}\n\n{{ bos_token }}\r\nc",
]


@pytest.mark.parametrize(
    "source", [*map(Path.read_text, FILES), *PIECES], ids=range(len(FILES) + 10)
)
def test_a_template_renders_as_in_transformers(source, monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)
    for messages in (USER, LONG, LONG[1:], LONG[:3], [*USER, *USER]):
        for answer_follows in (True, False):
            for variables in ({}, {"enable_thinking": False}):
                given = {"bos_token": "<s>", "eos_token": "</s>", **variables}
                expected = theirs(source, messages, answer_follows, **given)
                assert ours(source, messages, answer_follows, **given) == expected


# --- what a template cannot do -----------------------------------------------------------------

HOSTILE = {
    "{% set x = 'a' * 20000000000 %}": "too much memory|MemoryError",
    "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}": (
        "too much memory|MemoryError"
    ),
    "{{ 'a' * 2000000 }}": r"writes 2,000,0\d\d characters",
    "{{ '%9000000000d' % 1 }}": "not done after 1|too much memory|MemoryError|Overflow",
    "{{ 'a'.center(10 ** 10) }}": "too much memory|MemoryError",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": (
        "not done after 1"
    ),
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": (
        "not done after 1|Recursion"
    ),
    "{{ 9 ** (9 ** 9) }}": "not done after 1|MemoryError|too much memory",
    "{{ 1 / 0 }}": "line 1: the chat template fails: ZeroDivisionError",
    "{% include '/etc/passwd' %}": "TemplateNotFound: '?/etc/passwd",
    "{% import 'os' as os %}": "TemplateNotFound",
    "\n\n{{ messages + 1 }}": "line 3: the chat template fails: TypeError",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ messages[9].content }}": "line 1: the chat template fails: UndefinedError",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_template_is_bounded(source, monkeypatch):
    """Time and memory are limited, and the next template renders normally."""
    monkeypatch.setattr(template, "SECONDS", 1)
    monkeypatch.setattr(template, "MEMORY", 256 << 20)
    template._PROCESS.stop()  # what is started next has this limit
    began = time.process_time()
    try:
        with pytest.raises(ChatError, match=rf"chat_template\.jinja.*({HOSTILE[source]})"):
            of(source + CHATML).render(USER, True)
        assert ours(CHATML, USER, True) == theirs(CHATML, USER, True)
    finally:
        template._PROCESS.stop()
    assert time.process_time() - began < 1  # it was not here


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"jinja, line 2: the chat template is not valid Jinja: Expected"),
        ("{% for m in messages %}", r"not valid Jinja: Unexpected end of template"),
        ("{% break %}", "the chat template"),
        ("{% if a %}" * 2000 + "{% endif %}" * 2000, "the chat template"),
    ],
)
def test_what_is_not_jinja_is_said_so(source, message):
    """The message does not advise another order of turns."""
    with pytest.raises(ChatError, match=message) as error:
        of(source)
    assert "turns" not in str(error.value) and "Fix the template" in str(error.value)


def test_a_failure_is_no_refusal(chat, tmp_path):
    """Other turns would not help: what fails is named with its line."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((chat("smollm_2").folder / name).read_bytes())
    (folder / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    with pytest.raises(ChatError, match="line 1: the chat template fails: TypeError") as error:
        Chat(folder).prompt_ids([Message("user", "a")])
    assert "order" not in str(error.value)


# --- the process that renders ------------------------------------------------------------------


def test_a_process_that_was_killed_is_started_again():
    wanted = theirs(CHATML, USER, True)
    made = of(CHATML)
    for _ in range(3):
        assert made.render(USER, True) == wanted
        os.kill(template._PROCESS._started.pid, signal.SIGKILL)
        template._PROCESS._started.wait()


def test_a_fork_has_a_process_of_its_own():
    made = of(CHATML)
    wanted = made.render(USER, True)
    child = os.fork()
    if not child:
        os._exit(0 if [made.render(USER, True) for _ in range(50)] == [wanted] * 50 else 1)
    found = [made.render(USER, True) for _ in range(50)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert found == [wanted] * 50


def test_the_process_ends_with_the_one_that_asks():
    import subprocess
    import sys

    code = (
        "import datetime, os; from selm_jax.text import template as t; "
        "t.Template('a', 'f', {}, datetime.date(2024, 1, 1)); "
        "print(t._PROCESS._started.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    pid = int(done.stdout)
    # Its output is a pipe that has ended: whoever held it is gone.
    assert done.returncode == -signal.SIGKILL
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        os.sched_yield()
        time.sleep(0.01)
    raise AssertionError("it is still there")
