"""What looks like a key or password is refused wherever it stands, and is never shown."""

import re
import sys

import pytest
import yaml

from selm_jax import cli, config
from selm_jax.config import ConfigError, secrets

TREE = {
    "output": "runs/x",
    "iterations": 1,
    "model": {"source": "m"},
    "data": {"train": "t"},
    "candidates": {"dataset": False, "samples": 3},
    "objective": {"loss": "selm", "beta": 0.1, "alpha": 1e-3},
    "training": {"learning_rate": 5e-7, "global_batch": 8},
}
# Made up, each in the form that its maker gives to keys, and put together here so that no scanner
# takes them for real; the part that must not be shown is marked.
TAIL = "aB3dE6gH9" * 4
PREFIXES = ("sk-proj-", "sk-ant-api03-", "hf_", "ghp_", "github_pat_", "xoxb-", "AIza", "nvapi-")
KEYS = [
    *(f"<{prefix}{TAIL}>" for prefix in PREFIXES),
    f"<AKIA{'AB34' * 4}>",
    f"<eyJ{TAIL}.eyJ{TAIL}.{TAIL}>",
    "vllm serve {model} --api-key <token-abc123>",
    "vllm serve {model} --api-key=<secretvalue>",
    "python serve.py --model {model} --api_key <abc>",
    "serve {model} --hf-token <abcdef> --port 8000",
    "serve {model} --token <abcdef>",
    "serve {model} --admin-api-key '<very secret>'",
    "env VLLM_API_KEY=<token123> vllm serve {model}",
    "env HF_TOKEN=<abc> vllm serve {model}",
    "curl -H 'Authorization: Bearer <abcdef>' {model}",
    "Bearer <token-abc123>",
    "Basic <dXNlcjpwYXNzd29yZDE=>",
    "http://me:<hunter2>@127.0.0.1:8000",
    "https://bucket.example/x?X-Amz-Signature=<0123456789abcdef>",
    "-----BEGIN RSA PRIVATE KEY----- <MIIEpAIBAAKCAQEA>",
]
HARMLESS = {
    "rollout.remote.command": "vllm serve {model} --max-num-batched-tokens 8192 "
    "--tokenizer {model}",
    "rollout.remote.key_env": "VLLM_API_KEY",
    "feedback.settings": {"key_env": "OPENAI_API_KEY", "max_tokens": 5, "max_total_tokens": 10**6},
    "feedback.settings.extra": {"stop_token_ids": [1, 2], "logit_bias": {50256: -100}},
    "feedback.settings.instructions": {"punctuation:no_comma": {}, "keywords": ["token", "secret"]},
    "data.system": "You are a basic assistant. Never tell the password. Be a bearer of good news.",
    "model.source": "/models/task-0123456789abcdef0123/sk",
    "model.revision": "0123456789abcdef0123456789abcdef01234567",
    "text.template": {"bos_token": "<s>", "token": "<pad>", "enable_thinking": False},
    "data.train": "https-free/path?name=x",
    "rollout.remote.url": "http://[::1]:8000",
}


def with_value(key, value):
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    if key.startswith("rollout.remote"):
        tree["rollout"] = {"remote": {"engine": "vllm"}}
    group = tree
    *parents, last = key.split(".")
    for name in parents:
        group = group.setdefault(name, {})
    group[last] = value
    return tree


@pytest.mark.parametrize("text", KEYS)
@pytest.mark.parametrize(
    "key", ["rollout.remote.command", "feedback.settings.extra.user", "objective.x", "data.system"]
)
def test_a_key_is_refused_anywhere_without_being_shown(key, text):
    (secret,) = re.findall("<(.*)>", text)
    value = text.replace("<", "").replace(">", "")
    for held in (value, [1, {"deep": value}]):
        with pytest.raises(ConfigError) as error:
            config.parse(with_value(key, held))
        message = str(error.value)
        assert f"\n  {key}" in message and "key_env" in message
        assert secret not in message


@pytest.mark.parametrize(
    "name", ["api_key", "apiKey", "x-api-key", "Authorization", "password", "hf_token", "secret"]
)
def test_the_name_of_a_setting_tells_too(name):
    for group in ("feedback.settings.extra", "feedback.settings", "rollout.remote", "objective"):
        with pytest.raises(ConfigError, match=f"{group}.{name}: its name") as error:
            config.parse(with_value(f"{group}.{name}", "abc"))
        assert "abc" not in str(error.value).replace("abcdef", "")


@pytest.mark.parametrize("value", ["token-abc123", "0123456789abcdef", "a1b2" * 8, "", "my key"])
def test_a_key_in_place_of_the_name_of_its_variable(value):
    for group in ("rollout.remote", "feedback.settings"):
        with pytest.raises(
            ConfigError, match=f"{group}.key_env: the name of an environment"
        ) as error:
            config.parse(with_value(f"{group}.key_env", value))
        assert not value or value not in str(error.value)


@pytest.mark.parametrize("key", HARMLESS)
def test_what_is_no_key_passes(key):
    assert not list(secrets.found(with_value(key, HARMLESS[key])))


SECRET = f"sk-{TAIL}"


def test_no_way_in_shows_a_key(tmp_path, monkeypatch, capsys):
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(TREE))
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"feedback: {{settings: {{api_key: {SECRET}}}\nobjective: [}}\n")
    for arguments in (
        ["run", file, f"feedback.settings.extra={{user: {SECRET}}}"],
        ["run", file, f"feedback.settings.extra={{user: {SECRET}"],
        ["run", file, f"trainign.x={SECRET}"],
        ["run", broken],
        ["eval", "winrate", file, file, "--ranker", "judge", "--set", f"extra={{user: {SECRET}}}"],
        ["eval", "winrate", file, file, "--ranker", "judge", "--set", f"extra={{user: {SECRET}"],
    ):
        monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr()
        assert SECRET not in said.err + said.out
        assert "Traceback" not in said.err and "selm: " in said.err
