"""A run: an experiment, its folder, and what its stages share.

Everything here is a function of the experiment and of files; a stage that is run alone builds the
same things again. What is costly is built once, when it is first asked for.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from selm_jax.config import Experiment, as_dict, dump
from selm_jax.feedback import ranker as rankers
from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Decoder, Params, abstract_adapters, abstract_params
from selm_jax.models.families import read_as_reward_model, read_config
from selm_jax.models.lora import Lora
from selm_jax.models.lora import init as fresh_adapters
from selm_jax.models.quantize import check_installed, quantize
from selm_jax.objectives.build import build as build_objective
from selm_jax.objectives.losses import Objective
from selm_jax.parallel import multihost
from selm_jax.parallel.mesh import compute_dtype, count_slices, decode_mesh, make_mesh
from selm_jax.parallel.rules import (
    PRESETS,
    Rules,
    check_preset,
    place_rows,
    row_shardings,
    shardings,
)
from selm_jax.preferences.candidates import Dropped, Pair
from selm_jax.preferences.own_answers import OwnAnswers
from selm_jax.preferences.packing import PreferenceBatch
from selm_jax.preferences.selection import explore_named, rule_named, select
from selm_jax.rollout import remote
from selm_jax.rollout.engine import Engine, decoding_params, decoding_shardings
from selm_jax.rollout.sampling import Sampling
from selm_jax.run.log import Writers
from selm_jax.run.rows import (
    RunError,
    check_batches,
    check_heldout,
    check_own_answers,
    check_rated,
    question,
    told_of,
    told_of_overlap,
    trained_too,
)
from selm_jax.shell import artifacts
from selm_jax.shell.progress import bar, terminal
from selm_jax.shell.sealed import sha256
from selm_jax.shell.store import Store
from selm_jax.shell.threads import of_each
from selm_jax.shell.user_code import is_user_code
from selm_jax.text.answers import check_answers, longest_answered
from selm_jax.text.chat import Chat, ChatError
from selm_jax.text.prompts import Message, Prompt, PromptSet, digest, load_data, rows_of
from selm_jax.training.optimizer import optimizer
from selm_jax.training.update import Shardings, Update, make_update
from selm_jax.weights import sources
from selm_jax.weights.card import model_card
from selm_jax.weights.huggingface import checked_config, load

_VERSIONS = (
    *("selm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "jinja2"),
)


class Run:
    """An experiment at work in its folder."""

    def __init__(
        self,
        experiment: Experiment,
        console: Console | None = None,
        devices: Sequence[Any] | None = None,
        store: Store | None = None,
        imports: bool = True,
    ):
        """`devices`: all there are, if not given. `store` holds what runs beside this one have done
        already, and takes what this one does. Without `imports` the run is looked at: functions of the
        user's that the experiment names are never imported."""
        self.experiment = experiment
        self.devices = devices
        self.folder = Path(experiment.output)
        # Of several processes one talks.
        self.console = console or terminal(quiet=not multihost.is_first())
        self.store = store
        self.imports = imports
        self.servers: dict[str, str | None] = {}  # versions of those that answered, by iteration

    # Where things are

    @property
    def name(self) -> str:
        """The folder's own name, also where it was given as `.` or `..`."""
        return self.folder.resolve().name if self.folder.name in ("", "..") else self.folder.name

    def iteration(self, t: int) -> Path:
        return self.folder / f"iteration_{t}"

    def policy(self, t: int) -> Path:
        """The folder of the policy after iteration t; 0 is the start model."""
        return self.start.path if t == 0 else self.iteration(t) / "model"

    def reference(self, t: int) -> Path:
        """The folder of iteration t's reference."""
        return self.policy(self.reference_number(t))

    def reference_number(self, t: int) -> int:
        """The iteration that iteration t's reference came out of; 0 is the start model."""
        return 0 if self.experiment.training.reference_policy == "start" else t - 1

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    # The model

    @cached_property
    def start(self) -> sources.ModelFolder:
        model = self.experiment.model
        found = multihost.first_then_others(  # it may download into a folder that they share
            lambda: sources.resolve(model.source, revision=model.revision, progress=self.console)
        )
        multihost.check_same("the start model", lambda: found.origin)
        return found

    @cached_property
    def config(self) -> DecoderConfig:
        """Of the model, for the longest sequence of this run."""
        return self._facts.for_length(self.longest_sequence)

    @cached_property
    def _stored(self) -> DecoderConfig:
        """The facts of the start model as its folder tells them, and its tensors bear out."""
        return checked_config(self.start.path)

    @cached_property
    def _facts(self) -> DecoderConfig:
        """Those of what is trained: a reward model may begin from a language model."""
        if self.rates and self._stored.head is None:
            return read_as_reward_model(self.start.path, self.chat.tokenizer.pad_token_id)
        if self._stored.head is not None and not self.rates:
            raise RunError(
                f"{self.start.path} is a reward model, which says nothing; objective "
                f"{self.experiment.objective['loss']} trains a language model. Name one as model.source, and this one as ranker: "
                "`feedback: {ranker: reward_model, settings: {source: ...}}`"
            )
        return self._stored

    @cached_property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and its answer, at most.

        The data set's answers are counted only where it matters: for a model with two tables of
        rotary frequencies. What exceeds the model's positions is found when examples are made. For a
        reward model nothing is generated, so that there are no others.
        """
        if self.rates:
            pairs = [*self.every_prompt(), *self.heldout] if self._facts.has_two_tables else []
            return longest_answered(self.chat, pairs, whole=True) or 1
        answered = self.longest_prompt + self.experiment.rollout.max_new_tokens
        if not self._facts.has_two_tables or not self.experiment.candidates.dataset:
            return answered
        if self.experiment.text.layout == "paper":
            return max(answered, self.experiment.text.max_length)
        return max(answered, longest_answered(self.chat, self.every_prompt()))

    @cached_property
    def chat(self) -> Chat:
        e = self.experiment
        chat = Chat(self.start.path, e.text, self._stored.vocab_size)
        if not self.rates and (e.text.layout == "default" or not e.taught):
            chat.check_made_up()  # here, so that no verb makes anything with a model that it fails
        return chat

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.chat.stop_ids

    @cached_property
    def dtype(self) -> Any:
        platform = self.mesh.devices.flat[0].platform
        return compute_dtype(self.experiment.compute.dtype, platform)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        c = self.experiment.compute
        devices = self.devices or jax.devices()
        if c.preset == "single":
            if multihost.count() > 1:
                raise RunError("compute.preset is 'single': one device; there are processes beside")
            return make_mesh((1, 1, 1), devices[:1])
        dcn_data = c.dcn_data
        if dcn_data == -1:
            dcn_data = max(1, count_slices(devices) // c.dcn_fsdp)
        mesh = make_mesh((c.data, c.fsdp, c.tensor), self.devices, dcn=(dcn_data, c.dcn_fsdp, 1))
        check_preset(c.preset, mesh)
        return mesh

    @cached_property
    def decode_mesh(self) -> jax.sharding.Mesh:
        """The mesh as generation sees it: copies of the model, each on a few neighbours."""
        tensor = self.experiment.compute.decode_tensor or self.mesh.shape["tensor"]
        return decode_mesh(self.mesh, tensor)

    @property
    def rules(self) -> Rules:
        return PRESETS[self.experiment.compute.preset]

    @cached_property
    def param_shardings(self) -> Any:
        return shardings(abstract_params(self.config), self.mesh, self.rules)

    @cached_property
    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the model's parameters."""
        return self._placed(abstract_params(self.config), self.experiment.training.parameter_dtype)

    @cached_property
    def lora(self) -> Lora | None:
        if self.experiment.lora is None:
            return None
        return Lora(**as_dict(self.experiment.lora))

    @property
    def quantized(self) -> str | None:
        """How the base of adapters is quantised, if it is."""
        lora = self.experiment.lora
        return None if lora is None or lora.base == "full" else lora.base

    @cached_property
    def abstract_trained(self) -> Params:
        """The same of what is trained: the adapters, or else all parameters."""
        if self.lora is None:
            return self.abstract_params
        return self._placed(abstract_adapters(self.config, self.lora), "float32")

    def _placed(self, boxed: Params, dtype: str) -> Params:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=where),
            nn.unbox(boxed),
            shardings(boxed, self.mesh, self.rules),
        )

    @cached_property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.abstract_params))

    def load(self, folder: Path) -> Params:
        """The parameters of a model folder, each straight into its place on the mesh.

        A reward model that begins from a language model begins with a head of zeros.
        """
        dtype = jnp.dtype(self.experiment.training.parameter_dtype)
        fresh = self.rates and read_config(folder).head is None
        return load(
            folder, self.config, dtype=dtype, shardings=self.param_shardings, fresh_head=fresh
        )

    def start_of(self, t: int) -> Params:
        """What iteration t starts from; quantised if `lora.base` says so."""
        return self._quantized(self.load(self.policy(t - 1)))

    def reference_of(self, t: int) -> Params:
        """What iteration t's log-ratios are to: its start, or the run's; quantised likewise."""
        return self._quantized(self.load(self.reference(t)))

    def _quantized(self, params: Params) -> Params:
        if self.quantized is None:
            return params
        return jax.jit(quantize, static_argnums=1)(params, self.quantized)

    def trained(self, start: Params, t: int) -> Params:
        """What iteration t trains, before its first update: all parameters, or fresh adapters."""
        if self.lora is None:
            return start
        return fresh_adapters(self.abstract_trained, jax.random.fold_in(self._key, t))

    def fixed(self, start: Params, t: int) -> dict[str, Any]:
        """What iteration t's updates are given and leave as it is: `training.loop.train`'s
        `reference`, `base` and `key`."""
        live = self.experiment.training.reference == "live"
        if self.lora is None:  # a copy: the updates overwrite the parameters that they start from
            return {"reference": self.reference_of(t) if live else None}
        key = jax.random.fold_in(jax.random.fold_in(self._key, t), 1) if self.lora.dropout else None
        same = self.reference(t) == self.policy(t - 1)
        reference = (start if same else self.reference_of(t)) if live else None
        return {"base": start, "reference": reference, "key": key}

    @property
    def _key(self) -> jax.Array:
        return jax.random.key(self.experiment.seed)

    def decoding(self, params: Params) -> Params:
        """The parameters as the engine takes them, in the dtype of computing."""
        return decoding_params(
            params, self.dtype, decoding_shardings(self.config, self.decode_mesh)
        )

    def place(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Puts a batch on the devices, cut by rows; each process its own."""
        return place_rows(batch, self.mesh, self.rules)

    def batch_shardings(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Where a batch lies: cut by rows."""
        return row_shardings(batch, self.mesh, self.rules)

    # The parts that compute

    @cached_property
    def objective(self) -> Objective:
        settings = dict(self.experiment.objective)
        loss = self._may_import("objective.loss", settings.pop("loss"))
        return build_objective(loss, **settings)

    @cached_property
    def rates(self) -> bool:
        """Whether a reward model is trained."""
        return self._objective_says("rates")

    @cached_property
    def reference_free(self) -> bool:
        """Whether the reference need not be scored."""
        return self._objective_says("reference_free")

    def _objective_says(self, what: str) -> bool:
        """Of code of the user's, in a run that is only looked at: what it said when the run began."""
        if self.imports or not is_user_code(self.experiment.objective["loss"]):
            return getattr(self.objective, what)
        file = self.folder / "manifest.json"
        return file.exists() and bool(artifacts.read_sealed(file).get(what))

    def _may_import(self, key: str, name: str) -> str:
        """The name, unless it stands for code of the user's in a run that is only looked at."""
        if is_user_code(name) and not self.imports:
            raise RunError(
                f"{self.folder / 'config.yaml'}: {key} is {name!r}, code that this verb does not run: "
                "it only looks at the folder"
            )
        return name

    @cached_property
    def optimizer(self) -> Any:
        s = self.experiment.training
        return optimizer(s.optimizer, b1=s.b1, b2=s.b2, eps=s.eps, weight_decay=s.weight_decay)

    @cached_property
    def update(self) -> Update:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return make_update(
            Decoder(
                self.config,
                self.dtype,
                self.experiment.training.remat,
                lora=self.lora,
                quantized=self.quantized is not None,
            ),
            self.objective,
            self.optimizer,
            chunk=self.experiment.training.logprob_chunk,
            clip=self.experiment.training.clip,
            shardings=Shardings(
                jax.tree.map(lambda x: x.sharding, self.abstract_trained), replicated
            ),
        )

    @cached_property
    def engine(self) -> Engine:
        r = self.experiment.rollout
        return Engine.fitted(
            decoder=Decoder(self.config, self.dtype, scan=False),
            sampling=Sampling(r.temperature, r.top_k, r.top_p, r.min_p),
            slots=r.slots,
            max_prompt=self.longest_prompt,
            max_new_tokens=r.max_new_tokens,
            stop_ids=self.stop_ids,
            prefill_rows=r.prefill_rows,
            mesh=self.decode_mesh,
        )

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt.

        Raises:
          RunError: it is longer than `rollout.max_prompt_tokens` and bad rows are not dropped, or
            the chat template refuses a prompt. The message names it.
        """
        limit = self.experiment.rollout.max_prompt_tokens
        prompts = [*self.every_prompt(), *self.heldout]
        lengths = of_each(self._length, prompts)
        longest = max(lengths)
        if longest > limit:
            name = prompts[lengths.index(longest)].id
            long = sum(length > limit for length in lengths)
            raise RunError(
                f"prompt {name} has {longest} tokens, rollout.max_prompt_tokens is {limit} "
                f"({long} of {len(prompts)} prompts are longer); raise it, shorten the prompts, or set "
                "data.on_bad_row to 'drop' to leave out and count such rows"
            )
        return longest

    def _length(self, prompt: Prompt) -> int:
        if (known := self._lengths.get(prompt.messages)) is None:
            known = self._lengths[prompt.messages] = len(self.prompt_ids(prompt))
        return known

    def _misfit(self, prompt: Prompt) -> str | None:
        """Why its own answers do not fit. Counts the prompt by the way: its ids are at hand then."""
        if not self.rates and self._length(prompt) > self.experiment.rollout.max_prompt_tokens:
            return None  # `longest_prompt` tells of it
        return self.own_answers.misfit(prompt)

    @cached_property
    def _lengths(self) -> dict[tuple[Message, ...], int]:
        """Tokens of prompts counted so far: of a large data set that takes a minute."""
        return {}

    @cached_property
    def ranker(self) -> rankers.Ranker:
        f = self.experiment.feedback
        return rankers.build(self._may_import("feedback.ranker", f.ranker), **f.settings)

    @cached_property
    def select(self) -> Callable[..., Pair | Dropped]:
        """`selection.select` by the experiment's rules."""
        f = self.experiment.feedback
        return partial(
            select,
            rule=rule_named(self._may_import("feedback.rule", f.rule)),
            explore=explore_named(self._may_import("feedback.explore", f.explore)),
            ties=f.ties, cut_off=f.cut_off, min_margin=f.min_margin,
        )  # fmt: skip

    # The prompts

    @cached_property
    def all_prompts(self) -> PromptSet:
        return self._read_prompts("train")

    def prompts(self, t: int) -> list[Prompt]:
        """Those of iteration t: the usable ones among its rows."""
        d = self.experiment.data
        mine = rows_of(self.all_prompts.by_row(), t, self.experiment)
        found = [self.with_system(p) for p in mine if p is not None][: d.limit]
        if not found:
            raise RunError(f"{d.train}: of the {len(mine)} rows of iteration {t} none is usable")
        return found

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of what the policy answers. Raises RunError, with the prompt's id, if there are none."""
        chat = self.chat  # whose own faults are not the prompt's
        try:
            return chat.prompt_ids(prompt.messages)
        except ChatError as e:
            raise RunError(f"prompt {prompt.id}: {e}") from e

    def every_prompt(self) -> Iterator[Prompt]:
        """Those of all portions from the first iteration's on."""
        e = self.experiment
        for t in range(1, e.portions - e.data.first_portion + 2):
            yield from self.prompts(t)

    @cached_property
    def heldout(self) -> list[Prompt]:
        return [
            self.with_system(p) for p in self._heldout_rows[: self.experiment.data.heldout_limit]
        ]

    @cached_property
    def _heldout_rows(self) -> PromptSet:
        d = self.experiment.data
        if d.heldout is None:
            return PromptSet(())
        return self._read_prompts("heldout", pairs=self.rates)  # are what is looked at

    def _read_prompts(self, part: Literal["train", "heldout"], pairs: bool = True) -> PromptSet:
        d = self.experiment.data
        found = multihost.first_then_others(lambda: load_data(d, part, pairs=pairs))
        multihost.check_same(f"digest of {getattr(d, part)}", lambda: digest(found))
        if d.on_bad_row == "error" or self.rates:
            return found  # a prompt that is too long is an error, or nothing is generated
        return self._without_long(found, part)

    def _without_long(self, found: PromptSet, part: Literal["train", "heldout"]) -> PromptSet:
        e = self.experiment
        name, limit = getattr(e.data, part), e.rollout.max_prompt_tokens
        kept = found.without("prompt too long", lambda p: self._length(self.with_system(p)) > limit)
        if not kept:
            raise RunError(
                f"{name}: all {len(found)} prompts are longer than rollout.max_prompt_tokens ({limit})"
            )
        if part == "heldout" or not e.candidates.dataset:
            return kept
        own = self.own_answers
        fit = kept.without("answer too long", lambda p: not own.fits(self.with_system(p)))
        if not fit:
            why = own.misfit(self.with_system(kept[0]))
            raise RunError(f"{name}: the answers of all {len(kept)} prompts are too long: {why}")
        return fit

    @cached_property
    def own_answers(self) -> OwnAnswers:
        """How the data's answers are laid out, as far as they are used."""
        e, facts = self.experiment, self._facts
        alone = e.taught and not e.data.rejected
        return OwnAnswers(
            self.chat, e.text, ("chosen",) if alone else ("chosen", "rejected"),
            facts.head, facts.max_positions, e.training.row_length,
        )  # fmt: skip

    def with_system(self, prompt: Prompt) -> Prompt:
        """The prompt behind the experiment's system message, if it has one."""
        system = self.experiment.data.system
        if system is None:
            return prompt
        messages = (Message("system", system), *prompt.messages)
        return Prompt(prompt.id, messages, prompt.chosen, prompt.rejected, prompt.row)

    # What it tells

    def _check_first(self) -> None:
        """What the first process alone asks and writes to."""
        rows = [] if self.experiment.taught else [*self.every_prompt(), *self.heldout]
        rankers.check_asked(self.ranker, [question(prompt) for prompt in rows])

    def check(self) -> None:
        """Builds everything that can fail before any work is done."""
        _ = (self.objective, self.optimizer, self.select, self.all_prompts, self.heldout)
        multihost.on_first(self._check_first)
        e = self.experiment
        there = ("chosen", "rejected") if e.data.rejected else ("chosen",)
        if e.taught and not set(self.objective.roles) <= set(there):
            raise RunError(
                f"{self.objective} needs the roles {', '.join(self.objective.roles)}, but no "
                f"candidates compete, and the data set has {' and '.join(there)} alone. Answers alone "
                "can teach `loss: sft`, pairs `loss: dpo`; for y_ref set candidates.greedy: 1"
            )
        if self.rates:
            check_rated(e, self.objective)
        for line in self.told_of_rows():
            self.console.print(line, style="yellow", soft_wrap=True)
        if self.quantized is not None:
            check_installed()
        if e.training.rows % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]):
            raise RunError(
                f"training.rows is {e.training.rows}: rows are cut over the mesh axes data and "
                f"fsdp ({self.mesh.shape['data']} x {self.mesh.shape['fsdp']})"
            )
        self.check_rows()
        _ = (self.config, self.lora, self.abstract_trained)
        if not self.rates:
            _ = self.engine
            decoding_shardings(self.config, self.decode_mesh)
            if (server := e.rollout.remote) is not None:
                tokens = self.longest_prompt + e.rollout.max_new_tokens
                multihost.on_first(lambda: remote.check(server, tokens))
        if e.training.parameter_dtype == "bfloat16" and min(e.training.learning_rate) < 1e-5:
            self.console.print(
                "training.parameter_dtype is bfloat16: at this learning rate most steps are "
                "smaller than its resolution, and most parameters will not move",
                style="yellow",
            )

    def check_rows(self) -> None:
        """Looks at every row that is going to be used, for whatever would stop a later stage."""
        e, prompts = self.experiment, list(self.every_prompt())
        strict = e.data.on_bad_row == "error"
        look = e.candidates.dataset and (strict or self.rates)
        check_heldout(e.data, self.heldout, self._trained_too)
        if look:
            pairs = [*prompts, *self.heldout] if self.rates else prompts
            with self.bar("looks at the answers", len(pairs), "prompts") as advance:
                check_own_answers(self._misfit, pairs, advance, strict)
        if not self.rates:
            _ = self.longest_prompt
        if e.candidates.dataset or e.text.layout == "paper":
            check_answers(
                self.chat, prompts, layout=e.text.layout, on_bad_row=e.data.on_bad_row,
                whole=self.rates,
            )  # fmt: skip
        check_batches(e, [len(self.prompts(t)) for t in range(1, e.iterations + 1)])

    def told_of_rows(self) -> Iterator[str]:
        """What was done with rows and columns of the data that is not as somebody may expect."""
        d = self.experiment.data
        yield from told_of(d.train, self.all_prompts)
        yield from told_of(str(d.heldout), self._heldout_rows)
        yield from told_of_overlap(d, self.heldout, self._trained_too)

    @cached_property
    def _trained_too(self) -> list[Prompt]:
        return trained_too(self.heldout, self.every_prompt()) if self.heldout else []

    def open(self) -> None:
        """The first process writes config.yaml and manifest.json."""
        if multihost.is_first():
            artifacts.write_text(self.folder / "config.yaml", dump(self.experiment))
        self.write_manifest()

    def write_manifest(self) -> None:
        """What computed this run, and what its ranker was asked so far; the first process writes."""
        if not multihost.is_first():
            return
        file = self.folder / "manifest.json"
        manifest = artifacts.read_sealed(file) if file.exists() else {}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        servers = manifest.get("servers", {}) | self.servers
        device = jax.devices()[0]
        artifacts.write_sealed(
            file,
            {
                "name": self.name,
                "config_sha256": sha256(self.folder / "config.yaml"),
                "method": self.experiment.objective["loss"],
                "objective": self.experiment.objective,
                "rates": self.rates,
                "reference_free": self.reference_free,
                "layout": self.experiment.text.layout,
                "model": self.start.origin,
                "parameters": self.parameters,
                "versions": {v: importlib.metadata.version(v) for v in _VERSIONS},
                "python": platform.python_version(),
                "device": f"{self.mesh.size} x {device.device_kind} ({device.platform})",
                "mesh": dict(self.mesh.shape),
                "decode_mesh": dict(self.decode_mesh.shape),
                "processes": multihost.count(),
                "created": manifest.get("created", now),
                "feedback": dict(self._asked()),
                **({"servers": servers} if servers else {}),
            },
        )

    def _asked(self) -> Iterator[tuple[str, dict[str, dict[str, int | float]]]]:
        """By iteration and stage: how many prompts the ranker was asked about, and what it and the
        choice of them cost, from the counts of the finished stages."""
        for t in range(self.experiment.iterations + 1):
            stages = artifacts.Stages(self.iteration(t)).read()
            of_stage = {}
            for name, asked in (("rank", "scored"), ("evaluate", "prompts")):
                counts = stages.get(name, {}).get("counts", {})
                if asked in counts:
                    cost = ("ranker/", "acquisition/")
                    of_stage[name] = {"asked": counts[asked]} | {
                        key: value for key, value in counts.items() if key.startswith(cost)
                    }
            if of_stage:
                yield str(t), of_stage

    def model_card(self, t: int) -> str:
        """The README.md of the policy after iteration t."""
        rates, metrics = self.rates, artifacts.read_lines(self.metrics_file)
        return model_card(self.experiment, self.name, t, self.start.origin, metrics, rates)

    @cached_property
    def writers(self) -> Writers:
        """The trackers, opened when they are first asked for: before the first stage that has work."""
        artifacts.rewrite_lines(self.metrics_file)  # a kill may have torn the last one
        return Writers(self.folder, self.experiment, artifacts.read_lines(self.metrics_file))

    def logged(self, stage: str, t: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that a stage of iteration t has written."""
        found = artifacts.read_lines(self.metrics_file)
        return [line for line in found if (line["stage"], line["iteration"]) == (stage, t)]

    def log(self, stage: str, t: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard and wandb."""
        if not multihost.is_first():
            return
        line = {"stage": stage, "iteration": t, **metrics}
        writers = (
            self.writers
        )  # opened before the line is in the record, or they would show it twice
        artifacts.append_line(self.metrics_file, line)
        writers.write(line)

    def forget_metrics(self, which: Callable[[dict[str, Any]], bool]) -> None:
        """Drops lines of metrics.jsonl that are about to be written again."""
        if multihost.is_first():
            writers = self.writers
            if artifacts.rewrite_lines(self.metrics_file, lambda line: not which(line)):
                writers.start_over(artifacts.read_lines(self.metrics_file))

    def bar(self, title: str, total: int, unit: str):
        return bar(self.console, title, total, unit)

    def say(
        self, stage: str, t: int, counts: Mapping[str, Any], seconds: float, note: str = ""
    ) -> None:
        """One line for a finished stage; counts of details (`drops/tie`) are left to stage.json."""
        shown = ", ".join(
            _in_words(
                key.removeprefix("heldout/"),
                value,
                counts.get(f"{key}_low"),
                counts.get(f"{key}_high"),
            )
            for key, value in counts.items()
            if ("/" not in key or key.startswith("heldout/"))
            and not key.endswith(("_low", "_high"))
            if value != 0 or f"{key}_low" in counts
        )
        shown = f"{shown}  ({note})" if note else shown
        self.console.print(f"iteration {t}  {stage:<9} {seconds:7.1f} s   {shown}", soft_wrap=True)


def _in_words(name: str, value: Any, low: float | None = None, high: float | None = None) -> str:
    """A count, or a mean with the ends of its interval if it has one."""
    if value is None:  # of a judge
        return f"{name} not readable"
    interval = "" if low is None or high is None else f" [{low:,.3f}, {high:,.3f}]"
    return f"{name} {value:,.3f}{interval}" if isinstance(value, float) else f"{value:,} {name}"
