"""The commit that a run records is that of the code which runs."""

from __future__ import annotations

import subprocess

import pytest

from selm_jax.shell import commit as module


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A checkout whose package is taken for this one."""
    folder = tmp_path / "code" / "selm_jax"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", "-A")
    git(folder.parent, "commit", "-q", "-m", "one")
    monkeypatch.setattr(module, "_PACKAGE", folder)
    module.commit.cache_clear()
    yield folder
    module.commit.cache_clear()


def test_the_commit_of_a_checkout_and_whether_it_was_changed(package):
    head = git(package, "rev-parse", "HEAD")
    assert module.commit() == head
    (package / "a.py").write_text("x = 2\n")
    module.commit.cache_clear()
    assert module.commit() == f"{head}-changed"


def test_outside_a_checkout_it_is_what_pip_recorded(package, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PACKAGE", tmp_path / "site-packages" / "selm_jax")

    class Installed:
        def read_text(self, name):
            return '{"vcs_info": {"vcs": "git", "commit_id": "abc123"}}'

    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda name: Installed())
    module.commit.cache_clear()
    assert module.commit() == "abc123"


def test_without_git_nothing_is_known_and_nothing_fails(package, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(module.importlib.metadata, "distribution", no_package)
    module.commit.cache_clear()
    assert module.commit() is None


def no_package(name):
    raise module.importlib.metadata.PackageNotFoundError(name)
