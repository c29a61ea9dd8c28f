"""Renders chat templates in a separate process (`renderer`) with limits on time and memory."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selm_jax.text.tokenizer import ChatError

SECONDS = 5  # CPU time for one conversation; it usually takes about a millisecond
MEMORY = 1 << 30  # bytes of the process that renders
CHARACTERS = 1_000_000  # that a template may write, plus ten for each byte that it is given


class Refused(Exception):
    """The chat template refuses a conversation, with a message of its own."""


class Template:
    """A chat template with the variables that it may read.

    Args:
      source: Jinja source.
      where: the file that contains it, for error messages.
      variables: further variables of the template, such as the texts of special tokens.
      date: today's date for `strftime_now`.

    Raises:
      ChatError: if Jinja cannot compile it.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, Any], date: datetime.date):
        self.source, self.where = source, where
        self._key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._variables = {"tools": None, "documents": None, **variables, "today": str(date)}
        self._ask(None)

    def render(self, messages: Sequence[Mapping[str, str]], answer_follows: bool) -> str:
        """Renders a conversation, with or without the header of an answer.

        Raises:
          Refused: if the template refuses this conversation.
          ChatError: if the template fails, or exceeds its limits of time or memory.
        """
        given = {"messages": messages, "add_generation_prompt": answer_follows}
        return self._ask(self._variables | given)

    def _ask(self, variables: Mapping[str, Any] | None) -> str:
        answer = _PROCESS.ask(self._key, self.source, variables)
        at = f", line {answer['line']}" if answer.get("line") else ""
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise Refused(answer["refused"])
        if "syntax" in answer:
            raise ChatError(
                f"{self.where}{at}: the chat template is not valid Jinja: {answer['syntax']}. Fix "
                "the template, or download it again from the model's source"
            )
        raise ChatError(
            f"{self.where}{at}: the chat template fails: {answer['failed']}. Fix the template, or "
            "download it again from the model's source"
        )


class _Process:
    """The child process that renders all templates; it is started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: subprocess.Popen[bytes] | None = None
        self._of = 0  # the id of the process that started it: a fork needs its own
        self._known: set[str] = set()

    def ask(self, key: str, source: str, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        with self._lock:
            for _ in range(2):  # if it died for another reason, it is started once more
                process = self._running()
                request = [key, None if key in self._known else source, variables]
                answer = self._answer(process, json.dumps(request, default=str).encode())
                if answer is not None:
                    if "syntax" not in answer:
                        self._known.add(key)
                    return answer
                ended = process.wait()
                self._started = None
                if ended == -signal.SIGXCPU:
                    return {"failed": f"it is not done after {SECONDS} seconds of CPU time"}
            return {"failed": f"the process that rendered it ended with status {ended}"}

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], request: bytes) -> dict[str, Any] | None:
        """Sends a request and reads the answer; None if the process has died."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
        except OSError:
            return None
        line = process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._started is None or self._of != os.getpid():
            program = str(Path(__file__).with_name("renderer.py"))
            limits = map(str, (SECONDS, MEMORY, CHARACTERS))
            self._started = subprocess.Popen(
                [sys.executable, "-P", program, *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._of, self._known = os.getpid(), set()
        return self._started

    def stop(self) -> None:
        """Ends the process; the next request starts a new one."""
        process, self._started = self._started, None
        if process is not None and self._of == os.getpid():
            with contextlib.suppress(OSError):
                process.communicate()  # closes its input, which makes it exit


_PROCESS = _Process()
atexit.register(_PROCESS.stop)
