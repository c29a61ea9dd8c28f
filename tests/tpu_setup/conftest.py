"""Fixtures: a cloud in a folder, with a stand-in for gcloud and workers that install nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-central1-a",
    "NAME": "selm-1",
    "ACCELERATOR": "v5p-16",
    "BUCKET": "gs://my-bucket/selm",
    "POLL": "1",
}
EXPERIMENT = "experiments/quickstart.yaml"
SECRETS = {"HF_TOKEN": "hf_verySecret$'1", "WANDB_API_KEY": "wandb-verySecret-2"}

# `python -m venv FOLDER` with a pip that can be told to fail, and a selm that counts.
PYTHON = """#!/bin/bash
[[ "$1 $2" == "-m venv" ]] || exit 1
mkdir -p "${@: -1}/bin"
cp "$STANDIN/worker_bin/pip-of-venv" "${@: -1}/bin/pip"
cp "$STANDIN/worker_bin/selm-of-venv" "${@: -1}/bin/selm"
"""
PIP = """#!/bin/bash
echo "pip $*" >>"$HOME/pip.log"
fails="$STANDIN/fail-$(basename "$HOME")"
if [[ -s $fails ]]; then
  sed -i 1d "$fails"
  echo "ERROR: No matching distribution found for jax" >&2
  exit 1
fi
"""
SELM = """#!/bin/bash
# Eight steps with a file for each, like a run that resumes: finished steps are not repeated. The
# first worker does them, in the bucket; the others wait for what it puts there.
trap 'exit 75' TERM
output=$(printf '%s\\n' "$@" | sed -n 's|^\\(output=\\)\\?gs:/|'"$STANDIN/buckets"'|p')
if [[ $output == */not-mine/* ]]; then echo "selm: gs://not-mine: cannot write this" >&2; exit 1; fi
mkdir -p "$output/iteration_1"
token=$(sha256sum <<<"$HF_TOKEN" | cut -c1-8)
echo "$* HF_TOKEN=$token secrets:$(ls "$HOME/.selm/secrets" 2>&1 | wc -l)" >>"$HOME/selm.log"
if [[ " $* " == *" fail=yes "* ]]; then echo "ERROR: the loss is not finite" >&2; exit 1; fi
if [[ "$*" =~ \\ stuck=([0-9]+) && $HOME == *"-${BASH_REMATCH[1]}" && ! -e "$HOME/stuck" ]]; then
  touch "$HOME/stuck"
  while :; do sleep 0.1; done
fi
if [[ "$*" =~ \\ stop=([0-9]+) && ! -e "$HOME/stopped" ]]; then
  touch "$HOME/stopped"
  exit "${BASH_REMATCH[1]}"
fi
for step in 1 2 3 4 5 6 7 8; do
  [[ -e $output/iteration_1/step-$step ]] && continue
  while ((step > $(cat "$STANDIN/hold"))); do sleep 0.1; done # until it is preempted
  if [[ $HOME != *-0 ]]; then
    until [[ -e $output/iteration_1/step-$step ]]; do sleep 0.1; done
    date +%s.%N >>"$HOME/steps.log"
    continue
  fi
  sleep 0.4
  echo "$(basename "$HOME")" >"$output/iteration_1/step-$step.selm-partial"
  mv "$output/iteration_1/step-$step.selm-partial" "$output/iteration_1/step-$step"
  echo "{\\"steps\\": $step}" >"$output/iteration_1/stage.json"
  date +%s.%N >>"$HOME/steps.log"
done
"""


class Cloud:
    """The stand-in's folder, and the scripts run against it."""

    def __init__(self, folder: Path):
        self.root = folder
        for name in ("bin", "worker_bin"):
            (folder / name).mkdir()
        wrapper = (
            f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("standin.py")} "$@"\n'
        )
        for path, text in {
            "bin/gcloud": wrapper,
            "worker_bin/python3.12": PYTHON,
            "worker_bin/pip-of-venv": PIP,
            "worker_bin/selm-of-venv": SELM,
        }.items():
            (folder / path).write_text(text)
            (folder / path).chmod(0o755)
        # None of this machine's: a worker that is lost while it installs must not find a real pip.
        for name in ("python3.13", "python3.11", "python3"):
            (folder / "worker_bin" / name).symlink_to("/bin/false")
        self.play()
        self.settings = self.write_settings()

    def play(self, fails: dict[int, int] | None = None, **part) -> None:
        """What is to happen (see standin.py); `fails`: worker -> installations that fail there."""
        (self.root / "part.json").write_text(json.dumps(part))
        for worker, times in (fails or {}).items():
            (self.root / f"fail-worker-{worker}").write_text("fail\n" * times)

    def write_settings(self, **changes: str) -> Path:
        file = self.root / "settings.env"
        values = SETTINGS | changes
        file.write_text("# a comment\n\n" + "".join(f"{k}={v}\n" for k, v in values.items()))
        return file

    def script(
        self, name: str, *arguments, answer: str = "", secrets: bool = True, trace: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs tpu_setup/NAME.sh SETTINGS ARGUMENT...; stdout and stderr together."""
        begun = self.begin(name, *arguments, secrets=secrets, trace=trace)
        try:
            told, _ = begun.communicate(answer, timeout=120)
        except subprocess.TimeoutExpired:
            begun.kill()
            raise
        return subprocess.CompletedProcess(begun.args, begun.returncode, told)

    def begin(
        self, name: str, *arguments, secrets: bool = True, trace: bool = False
    ) -> subprocess.Popen[str]:
        environment = SECRETS.copy() if secrets else {}
        environment |= {"STANDIN": str(self.root), "HOME": str(self.root)}
        environment |= {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}
        environment |= {"TMPDIR": str(self.root / "tmp")}
        (self.root / "tmp").mkdir(exist_ok=True)
        script = str(REPOSITORY / f"tpu_setup/{name}.sh")
        return subprocess.Popen(
            ["bash", *(["-x"] if trace else []), script, str(self.settings), *map(str, arguments)],
            env=environment, text=True, cwd=self.root, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def calls(self) -> list[list[str]]:
        file = self.root / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def verbs(self, group: str = "queued-resources") -> list[str]:
        """The verbs of one group, in order, without `describe`."""
        found = [c[3] for c in self.calls if c[:3] == ["compute", "tpus", group]]
        return [verb for verb in found if verb != "describe"]

    def worker(self, k: int) -> Path:
        return self.root / f"worker-{k}"

    @property
    def bucket(self) -> Path:
        return self.root / "buckets/my-bucket/selm/runs/quickstart"

    def in_bucket(self) -> dict[str, str]:
        """The run as the bucket has it."""
        folder = self.bucket
        return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}

    def become_active(self) -> None:
        """A slice becomes ACTIVE while it is looked at."""
        for _ in range(2):
            subprocess.run(
                [self.root / "bin/gcloud", "compute", "tpus", "queued-resources", "describe",
                 "selm-1", "--project=my-project", "--zone=us-central1-a"],
                env={"STANDIN": str(self.root), "PATH": os.environ["PATH"]}, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def wait(self, what, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.1)

    def end(self) -> None:
        """No process of a worker outlives its test."""
        for file in self.root.glob("worker-*/.selm/*.pid"):
            try:
                os.killpg(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def cloud(tmp_path):
    if shutil.which("setsid") is None:
        pytest.skip("the workers' scripts need setsid, of util-linux")
    made = Cloud(tmp_path)
    yield made
    made.end()
