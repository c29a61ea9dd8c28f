"""The model that a run starts from: its folder, its facts, and how it reads and writes text."""

from __future__ import annotations

from functools import cached_property

from rich.console import Console

from selm_jax.config import Experiment
from selm_jax.models.config import DecoderConfig
from selm_jax.parallel import multihost
from selm_jax.run.task import Task
from selm_jax.text.chat import Chat
from selm_jax.weights import sources
from selm_jax.weights.huggingface import checked_config


class StartModel:
    """The model that `model.source` names. It is downloaded when something of it is first asked for."""

    def __init__(self, experiment: Experiment, task: Task, console: Console):
        self.experiment, self.task, self.console = experiment, task, console

    @cached_property
    def folder(self) -> sources.ModelFolder:
        model = self.experiment.model
        found = multihost.first_then_others(  # it may download into a folder that they share
            lambda: sources.resolve(model.source, revision=model.revision, progress=self.console)
        )
        multihost.check_same("the start model", lambda: found.origin)
        return found

    @cached_property
    def _stored(self) -> DecoderConfig:
        """The facts as its folder tells them, and its tensors bear out."""
        return checked_config(self.folder.path)

    @cached_property
    def facts(self) -> DecoderConfig:
        """The facts of what is trained; see `Task.facts`."""
        file = self.folder.path / "config.json"
        return self.task.facts(self._stored, file, lambda: self.chat.tokenizer.pad_token_id)

    @cached_property
    def chat(self) -> Chat:
        """Its tokenizer and template.

        Raises:
          ChatError: they cannot be used. It is raised here, so that no verb makes anything with a
            model that it then fails on.
        """
        e = self.experiment
        chat = Chat(self.folder.path, e.text, self._stored.vocab_size)
        self.task.check_chat(chat, e)
        return chat
