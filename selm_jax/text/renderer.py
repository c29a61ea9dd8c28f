"""A separate process that renders chat templates with limits on time and memory.

A chat template is a program that comes with a model. Jinja's sandbox keeps it away from files and
from Python's internals, but cannot stop an endless loop or an endless text, and nothing in the same
process can. So templates are rendered in this process, under the operating system's limits of time
and memory; `template` runs it.

Each line of standard input is JSON, [key, source, variables]; the source is sent once for each key.
Each line of standard output is the answer, an object with one of the keys `text`, `refused` (the
template's own message), `syntax` and `failed`, and with `line` if it is known.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import resource
import signal
import sys
import time
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes


class _Refused(jinja2.TemplateError):
    """The template refused the conversation: it called `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """Accepts and ignores the tag {% generation %}, which in some templates marks the answer."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """Makes a Jinja environment for chat templates, with the same options as in transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        loader=jinja2.DictLoader({}),  # {% include %} finds nothing
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: object) -> None:
    raise _Refused(str(message))


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's filter `tojson`, but without HTML escapes, as in transformers."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys,
    )  # fmt: skip


def _rendered(template: jinja2.Template, variables: dict[str, Any]) -> str:
    day = datetime.datetime.combine(
        datetime.date.fromisoformat(variables.pop("today")), datetime.time()
    )
    return template.render(**variables, strftime_now=day.strftime)


def _answer(compiled: dict[str, jinja2.Template], request: bytes, most: int) -> dict[str, Any]:
    try:
        key, source, variables = json.loads(request)
        if source is not None:
            compiled[key] = _environment().from_string(source)
        if variables is None:  # only to check that it compiles
            return {"text": ""}
        text = _rendered(compiled[key], variables)
        if len(text) > most + 10 * len(request):
            return {"failed": f"it writes {len(text):,} characters"}
        return {"text": text}
    except _Refused as e:
        return {"refused": str(e)}
    except jinja2.TemplateSyntaxError as e:
        return {"syntax": e.message or "", "line": e.lineno}
    except MemoryError:
        return {"failed": "it needs too much memory"}
    except Exception as e:  # noqa: BLE001 - the other process reports whatever goes wrong
        return {"failed": f"{type(e).__name__}: {e}"[:1000], "line": _line(e)}


def _line(error: BaseException) -> int | None:
    """The line of the template where an error occurred."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def main(seconds: int, memory: int, most: int) -> None:
    """Renders the conversations that arrive on standard input, until the input ends.

    Args:
      seconds: CPU time for one answer; exceeding it ends the process with SIGXCPU.
      memory: the most bytes that the process may use.
      most: the most characters of a text, plus ten for each byte of the request.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system lets it be set
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    compiled: dict[str, jinja2.Template] = {}
    for request in sys.stdin.buffer:
        limit = math.ceil(time.process_time()) + seconds
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
        answer = json.dumps(_answer(compiled, request, most)).encode()
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
