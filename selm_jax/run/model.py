"""The model that a run starts from: its folder, configuration, tokenizer and chat template."""

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
    """The model that `model.source` names, downloaded on first use."""

    def __init__(self, experiment: Experiment, task: Task, console: Console):
        self.experiment, self.task, self.console = experiment, task, console

    @cached_property
    def folder(self) -> sources.ModelFolder:
        model = self.experiment.model
        served = self.experiment.rollout.remote is not None  # by a program that wants files
        found = multihost.first_then_others(  # it may download into a folder that all share
            lambda: sources.resolve(
                model.source, revision=model.revision, progress=self.console, whole=served
            )
        )
        multihost.check_same("the start model", lambda: found.origin)
        return found

    @cached_property
    def _stored(self) -> DecoderConfig:
        """The configuration in the model's folder, checked against the model's tensors."""
        return checked_config(self.folder.path)

    @cached_property
    def facts(self) -> DecoderConfig:
        """The configuration of the trained model, which may have a new head; see `Task.facts`."""
        file = self.folder.path / "config.json"
        return self.task.facts(self._stored, file, lambda: self.chat.tokenizer.pad_token_id)

    @cached_property
    def chat(self) -> Chat:
        """The model's tokenizer and chat template.

        Raises:
          ChatError: the template cannot be used. Raised here so that every command fails before it
            does any work with the model.
        """
        e = self.experiment
        chat = Chat(self.folder.path, e.text, self._stored.vocab_size)
        self.task.check_chat(chat, e)
        return chat
