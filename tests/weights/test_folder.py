"""The files that an export copies, and those that it does not: code, and linked files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import make_model

from selm_jax.models.families import read_config
from selm_jax.weights.export import convert_dtype, export_folder
from selm_jax.weights.files import WeightsError
from selm_jax.weights.folder import folder_digest
from selm_jax.weights.huggingface import load
from selm_jax.weights.sources import SourceError, resolve

# Beside the tiny model's own: what folders of tokenizers hold, in one way of writing or another.
ALONG = {
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "tokenizer.model": "sentencepiece",
    "tokenizer.model.v3": "sentencepiece",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "chat_template.json": "{}",
    "preprocessor_config.json": '{"do_resize":  true}',
    "processor_config.json": "{}",
    "generation_config.json": '{"eos_token_id":   1}',
    "LICENSE.txt": "words",
    "NOTICE": "words",
    "USE_POLICY.md": "words",
}
BEHIND = {
    "modeling_tiny.py": "1 / 0",
    "tokenizer_tiny.py": "1 / 0",
    "additional_chat_templates/code.py": "1 / 0",
    "training_args.bin": "pickled",
    "optimizer.pt": "pickled",
    "notes.json": "{}",
    "original/params.json": "{}",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("made") / "m")
    for name, text in (ALONG | BEHIND).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def exported(model, out):
    config = read_config(model)
    export_folder(load(model, config), config, model, out / "run", "# card\n")
    convert_dtype(out / "run", out / "to", "bfloat16")
    return out / "run", out / "to"


def files(folder):
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_all_of_a_tokenizer_goes_with_the_model_and_nothing_else(model, tmp_path):
    own = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    made = {"config.json", "model.safetensors", "README.md"}
    for folder in exported(model, tmp_path):
        assert files(folder) == {*ALONG, *own, *made}
        for name in {*ALONG, *own}:
            assert (folder / name).read_bytes() == (model / name).read_bytes(), name


def test_the_digest_of_a_folder_sees_its_other_templates(model):
    before = folder_digest(model)
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ other }}")
    assert folder_digest(model) != before


def test_an_export_names_no_code(model, tmp_path):
    """Like Phi-3's folders, which transformers can load with its own classes."""
    named = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoTokenizer": ["tokenizer_tiny.T", None],
    }
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(settings | {"auto_map": named}))
    folders = exported(model, tmp_path)
    for folder in folders:
        for name in files(folder):
            assert b"auto_map" not in (folder / name).read_bytes(), name
        assert json.loads((folder / "preprocessor_config.json").read_text()) == {"do_resize": True}
    code = """
import sys
sys.modules["torch"] = None  # as on a machine that has none, and quicker
from transformers import AutoConfig, AutoTokenizer
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    templates = AutoTokenizer.from_pretrained(folder, trust_remote_code=True).chat_template
    print(type(config).__name__, *sorted(templates))
"""
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True,
        check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert found.stdout.splitlines() == ["LlamaConfig default rag tool_use"] * 2


# --- links ----------------------------------------------------------------------------------------


def test_a_circle_of_links_is_named(model):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(SourceError, match=r"tokenizer\.json is a link to"):
        resolve(str(model))


@pytest.mark.parametrize("name", ["tokenizer.model", "LICENSE", "config.json", "README.md"])
def test_a_link_out_of_the_folder_is_refused_by_name(model, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text((model / name).read_text() if (model / name).exists() else "secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret")
    for use in (lambda: resolve(str(model)), lambda: exported(model, tmp_path)):
        with pytest.raises(
            (SourceError, WeightsError), match=f"{name} is a link to {secret}, outside the folder"
        ):
            use()
    assert not (tmp_path / "run").exists()


def test_a_linked_folder_of_templates_is_refused_too(model, tmp_path):
    shutil.move(model / "additional_chat_templates", tmp_path / "elsewhere")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=r"additional_chat_templates/rag\.jinja is a link"):
        resolve(str(model))


def test_a_link_to_nothing_is_named(model):
    """This is a Hub snapshot that was copied without the files to which it links."""
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("../../blobs/0123abcd")
    with pytest.raises(
        SourceError, match=r"tokenizer\.json is a link to .*0123abcd, which does not exist"
    ):
        resolve(str(model))


def test_links_of_the_hubs_cache_and_within_a_folder_are_files(model, tmp_path):
    """A snapshot links to blobs beside it, and people link to snapshots and between own files."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in files(model):
        shutil.move(model / name, repository / "blobs" / name.replace("/", "-"))
        (snapshot / name).parent.mkdir(exist_ok=True)
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{name.replace('/', '-')}")
    (snapshot / "NOTICE").unlink()
    (snapshot / "NOTICE").symlink_to("LICENSE.txt")
    (tmp_path / "mine").symlink_to(snapshot)
    found = resolve(str(tmp_path / "mine")).path
    for folder in exported(found, tmp_path):
        assert files(folder) >= set(ALONG)
        assert not any(f.is_symlink() for f in folder.rglob("*"))
        assert (folder / "NOTICE").read_text() == "words"
    # A link of a snapshot that leads past the cache's own files is one like any other.
    (snapshot / "NOTICE").unlink()
    (snapshot / "NOTICE").symlink_to(tmp_path / "run" / "NOTICE")
    with pytest.raises(SourceError, match="NOTICE is a link to"):
        resolve(str(tmp_path / "mine"))
