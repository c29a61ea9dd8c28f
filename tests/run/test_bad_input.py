"""Bad input: one clear message that names the file, key or row, and nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny

from selm_jax import cli
from selm_jax.shell import artifacts
from selm_jax.shell.lock import only_one


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.experiment(folder)
    return folder


def said(capsys, monkeypatch, *arguments) -> str:
    """What `selm` says on stderr when it fails; it must be a message, not a trace."""
    monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def nothing_of(run):
    """No stage has left anything, whole or partial."""
    return not [p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", ".selm")]


CONFIG_MISTAKES = {
    "unknown key": (
        ["training.lerning_rate=1"], "training.lerning_rate: unknown key", "learning_rate",
    ),
    "mistyped value": (["training.rows=four"], "training.rows", "'four'"),
    "alpha missing": (["objective={loss: selm, beta: 0.1}"], "alpha", "selm"),
    "unknown loss": (["objective.loss=slem"], "slem", "did you mean 'selm'"),
    "unknown ranker": (["feedback.ranker=sentimnt"], "sentimnt", "sentiment"),
    "unknown setting of a loss": (["objective.gama=1"], "gama", "beta"),
    "unknown value": (["training.schedule=cosin"], "training.schedule", "cosin"),
    "not an override": (["training.rows"], "training.rows", "key.path=value"),
    "rates for other iterations": (
        ["training.learning_rate=[1e-1,1e-2,1e-3]"], "learning_rate", "3 values",
    ),
    "a mesh that does not fit": (["compute={data: 3, fsdp: 1}"], "mesh axes", "1 devices"),
}  # fmt: skip


@pytest.mark.parametrize("overrides,what,hint", CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES)
def test_settings(base, capsys, monkeypatch, tmp_path, overrides, what, hint):
    out = tmp_path / "run"
    message = said(
        capsys, monkeypatch, "run", base / "experiment.yaml", f"output={out}", *overrides
    )
    assert what in message and hint in message
    assert not out.exists() or nothing_of(out)


def rows(file, *changes):
    good = [{"prompt_id": f"p{i}", "prompt": f"Say {i}.", "chosen": "Yes.", "rejected": "No."}
            for i in range(6)]  # fmt: skip
    for i, change in changes:
        good[i] |= change
    file.write_text("".join(json.dumps(row) + "\n" for row in good))
    return file


PAIRS = ["data.chosen=chosen", "data.rejected=rejected", "candidates.dataset=true"]
DATA_MISTAKES = {
    "column missing": ([], ["data.prompt=question"], "question", "prompt"),
    "chosen equals rejected": (
        [(2, {"rejected": "Yes."})], PAIRS, "row 3", "chosen equals rejected",
    ),
    "empty prompt": ([(4, {"prompt": "  "})], [], "row 5", "empty prompt"),
    "empty response": ([(1, {"chosen": ""})], PAIRS, "row 2", "empty response"),
    "prompt too long": ([(3, {"prompt": "so " * 200})], [], "max_prompt_tokens", "64"),
    "skip beyond the rows": (
        [], ["data.skip=9"], "6 rows, 0 of them after data.skip: 9", "2 portions",
    ),
    "skip leaves too few": (
        [], ["data.skip=5"], "6 rows, 1 of them after data.skip: 5", "2 portions",
    ),
    "more portions than rows": ([], ["data.portions=7"], "6 rows; data.portions", "7 portions"),
    "more iterations than rows": (
        [], ["iterations=7", "training.learning_rate=1e-3"], "6 rows; iterations", "7 portions"
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes,overrides,what,hint", DATA_MISTAKES.values(), ids=DATA_MISTAKES)
def test_data(base, capsys, monkeypatch, tmp_path, changes, overrides, what, hint):
    file = rows(tmp_path / "data.jsonl", *changes)
    out = tmp_path / "run"
    message = said(
        capsys, monkeypatch, "run", base / "experiment.yaml", f"output={out}",
        f"data.train={file}", *overrides,
    )  # fmt: skip
    assert what in message and hint in message
    assert "max_prompt" in what or str(file) in message
    assert nothing_of(out)


NO_HEADER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
MODEL_MISTAKES = {
    "no header": (
        "chat_template.jinja", NO_HEADER, "does not begin an answer", "generation_prompt",
    ),
    "no stop": (
        "chat_template.jinja", tiny.TEMPLATE.replace("im_end", "im_over"), "does not end an answer",
        "eos_token_id",
    ),
    "no Jinja": (
        "chat_template.jinja", "\n{% if %}", "chat_template.jinja, line 2", "not valid Jinja",
    ),
    "a failure": ("chat_template.jinja", "{{ 1 + 'a' }}", "template fails: TypeError", "line 1"),
    "stop beyond": (
        "generation_config.json", '{"eos_token_id": 320}', "eos_token_id is 320", "319",
    ),
    "code": ("tokenizer_config.json", '{"auto_map": {"A": "evil.A"}}', "auto_map", "never run"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["run", "preview"])
@pytest.mark.parametrize("file,content,what,hint", MODEL_MISTAKES.values(), ids=MODEL_MISTAKES)
def test_a_model_folder(base, capsys, monkeypatch, tmp_path, verb, file, content, what, hint):
    """With prompts alone, of which no answer of the data would show it."""
    model = shutil.copytree(base / "model", tmp_path / "model")
    (model / file).write_text(content)
    out = tmp_path / "run"
    message = said(
        capsys, monkeypatch, verb, base / "experiment.yaml", f"output={out}",
        f"model.source={model}", "candidates.dataset=false",
    )  # fmt: skip
    assert what in message and hint in message and str(model) in message
    assert "prompt p" not in message  # whose fault it is not
    assert nothing_of(out)


def test_responses_longer_than_a_row_are_refused_before_training(
    base, capsys, monkeypatch, tmp_path
):
    out = tmp_path / "run"
    message = said(
        capsys, monkeypatch, "run", base / "experiment.yaml", f"output={out}",
        "training.row_length=48",
    )  # fmt: skip
    assert "row_length" in message and "example p" in message
    assert not list(out.rglob("*partial"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 9\n"
MODEL_MISTAKES = {
    "config.json is a list": ("config.json", lambda raw: b"[]", "contains a list"),
    "config.json is a pointer": ("config.json", lambda raw: POINTER, "config.json is a Git LFS"),
    "a text for a number": (
        "config.json", lambda raw: raw.replace(b'"hidden_size": 32', b'"hidden_size": "32"'),
        "hidden_size is '32'",
    ),
    "absurdly many layers": (
        "config.json",
        lambda raw: raw.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 1000000000'),
        "num_hidden_layers is 1000000000",
    ),
    "more layers than tensors": (
        "config.json",
        lambda raw: raw.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 90'),
        "missing: model.layers.2.",
    ),
    "weights are a pointer": (
        "model.safetensors", lambda raw: POINTER, "model.safetensors is a Git LFS pointer",
    ),
    "weights are cut off": (
        "model.safetensors", lambda raw: raw[:-9], "model.safetensors is damaged or cut off",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "verb,mistake",
    [*(("run", name) for name in MODEL_MISTAKES), ("preview", "more layers than tensors")],
)
def test_odd_files_of_a_model(base, capsys, monkeypatch, tmp_path, verb, mistake):
    file, change, what = MODEL_MISTAKES[mistake]
    model, out = shutil.copytree(base / "model", tmp_path / "model"), tmp_path / "run"
    before = (model / file).read_bytes()
    (model / file).write_bytes(change(before))
    assert (model / file).read_bytes() != before
    message = said(
        capsys, monkeypatch, verb, base / "experiment.yaml", f"output={out}",
        f"model.source={model}",
    )  # fmt: skip
    assert what in message and str(model) in message
    assert not out.exists() or nothing_of(out)


def test_a_model_folder_without_tokenizer(base, capsys, monkeypatch, tmp_path):
    model = tiny.make_model(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    message = said(
        capsys, monkeypatch, "run", base / "experiment.yaml", f"output={tmp_path / 'run'}",
        f"model.source={model}",
    )  # fmt: skip
    assert str(model) in message and "tokenizer.json" in message


def test_a_corrupt_gguf(base, capsys, monkeypatch, tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    message = said(
        capsys, monkeypatch, "run", base / "experiment.yaml", f"output={tmp_path / 'run'}",
        f"model.source={file}",
    )  # fmt: skip
    assert str(file) in message


def test_no_network_and_no_cached_weights(base, tmp_path):
    """In a process of its own: nothing of this one's caches or settings may help."""
    environment = os.environ | {
        "SELM_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_INDEX": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = subprocess.run(
        [sys.executable, "-m", "selm_jax", "run", str(base / "experiment.yaml"),
         f"output={tmp_path / 'run'}", "model.source=HuggingFaceTB/SmolLM2-135M-Instruct"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "SmolLM2-135M-Instruct" in done.stderr and "Traceback" not in done.stderr
    assert nothing_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["responses", "ranked.parquet", "examples.parquet", "final", "model"]
)
def test_a_full_disk_stops_the_run_and_a_second_start_ends_it(
    base, capsys, monkeypatch, tmp_path, stage
):
    """The disk fills while an artefact of this kind is flushed."""
    out = tmp_path / "run"
    flush, full = artifacts.flush, [True]

    def flush_on_a_full_disk(path):
        if full[0] and stage in str(path.relative_to(out)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    monkeypatch.setattr(artifacts, "flush", flush_on_a_full_disk)
    arguments = ("run", base / "experiment.yaml", f"output={out}", "iterations=1",
                 "training.learning_rate=1e-3")  # fmt: skip
    message = said(capsys, monkeypatch, *arguments)
    assert "No space left on device" in message and stage in message
    assert not list(out.rglob("*partial"))
    full[0] = False
    monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments)])
    cli.main()
    assert (out / "iteration_1" / "model" / "model.safetensors").exists()


def test_a_second_process_is_refused(base, capsys, monkeypatch, tmp_path):
    out = tmp_path / "run"
    with only_one(out):
        message = said(capsys, monkeypatch, "run", base / "experiment.yaml", f"output={out}")
    assert "another process" in message and str(out) in message


@pytest.mark.slow
def test_ctrl_c_leaves_130_and_a_run_that_goes_on(base, tmp_path):
    out = tmp_path / "run"
    arguments = ["run", str(base / "experiment.yaml"), f"output={out}", "iterations=1",
                 "training.learning_rate=1e-3"]  # fmt: skip
    # A shell's background jobs ignore Ctrl-C, and so would their children: undo that.
    heed = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from selm_jax.cli import main; main()"
    )
    command = [sys.executable, "-c", heed, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "iteration_1" / "stage.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in message and "Traceback" not in message
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (out / "iteration_1" / "model" / "model.safetensors").exists()
