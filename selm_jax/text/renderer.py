"""A process that renders chat templates, and is ended where one takes too long or too much.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and from
Python's insides, but not from a loop without end or a text without end, and nothing in the same
process can. So templates are rendered here, under the operating system's limits of time and memory;
`template` is the other side.

Each line of standard input is JSON, [key, source, variables]: the source comes once for each key.
Each line of standard output is the answer, an object with one of the keys `text`, `refused` (what
the template itself says), `syntax` and `failed`, and with `line` where it is known.
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
    """What a template says that refuses a conversation."""


class _Generation(jinja2.ext.Extension):
    """{% generation %}, by which some templates tell which part is the model's: all is rendered."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it, which is how transformers sets it up."""
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
    """Jinja's own filter escapes what would be HTML."""
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
        if variables is None:  # to see whether it compiles
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
        return {"failed": "it takes more memory than a chat template may"}
    except Exception as e:  # noqa: BLE001 - whatever a template does is told in the other process
        return {"failed": f"{type(e).__name__}: {e}"[:1000], "line": _line(e)}


def _line(error: BaseException) -> int | None:
    """The line of the template where an error came up."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def main(seconds: int, memory: int, most: int) -> None:
    """Answers until standard input ends.

    Args:
      seconds: of computing for one answer; more of it ends the process with SIGXCPU.
      memory: bytes that the process may have.
      most: characters of a text, besides ten for each of the request.
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
