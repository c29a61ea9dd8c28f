"""A stand-in for gcloud: records its calls, plays a written part, and runs the workers for real.

Its folder is in STANDIN. `part.json` says what is to happen:

    create       answers to `create`, one a call: ok, quota, unavailable; ok when they run out
    lives        per slice that is created, how many steps of the run it lets be done; then it is
                 preempted: its processes die and its disks are gone. All of them when they run
                 out. No clock is in it, so that a busy machine plays the same
    hold         how many steps are done before the test writes another number into the file `hold`
    states       what a new slice says before it is ACTIVE
    workers      how many it has
    deaf         how many ssh calls are not answered, from the first on
    broken       [text, worker, times]: commands with this text, which do not reach this worker (-1:
                 any) so many times

A file `fail-worker-1` with three lines makes pip fail three times on worker 1.
A worker is a folder that is its HOME, and `ssh --command` runs bash in it. A bucket is also a
folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["STANDIN"])
STATE = ROOT / "state.json"


def main(argv: list[str]) -> int:
    with (ROOT / "calls.jsonl").open("a") as f:
        f.write(json.dumps(argv) + "\n")
    words = [a for a in argv if not a.startswith("--")]
    flags = dict(a[2:].partition("=")[::2] for a in argv if a.startswith("--"))
    if words[0] == "storage":
        return storage(words[1:], flags)
    if words[:3] == ["compute", "tpus", "queued-resources"]:
        assert flags["project"] == "my-project" and flags["zone"] == "us-central1-a"
        return {"create": create, "describe": describe, "delete": delete}[words[3]](words[4], flags)
    if words[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
        return ssh(words[4], flags)
    if words[:4] == ["compute", "tpus", "tpu-vm", "scp"]:
        return scp(words[4], words[5], flags)
    raise SystemExit(f"stand-in: {argv}")


def read() -> dict:
    fresh = {"slice": None, "created": 0, "asked": 0, "ssh": 0}
    return json.loads(STATE.read_text()) if STATE.exists() else fresh


def write(state: dict) -> None:
    STATE.write_text(json.dumps(state))


def part() -> dict:
    return json.loads((ROOT / "part.json").read_text())


def say(text: str, status: int = 1) -> int:
    print(text, file=sys.stderr)
    return status


# --- the slice ------------------------------------------------------------------------------------


def create(name: str, flags: dict) -> int:
    state = read()
    answers = part().get("create", [])
    answer = answers[state["asked"]] if state["asked"] < len(answers) else "ok"
    state["asked"] += 1
    if answer == "ok":
        assert state["slice"] is None, "it is there already"
        assert flags["node-id"] == name
        lives = part().get("lives", [])
        number = state["created"]
        before = part().get("states", ["WAITING_FOR_RESOURCES", "PROVISIONING"])
        life = lives[number] if number < len(lives) else 10**9
        hold = part().get("hold", life)
        (ROOT / "hold").write_text(f"{hold}\n")  # the workers' selm goes no further
        state["slice"] = {"name": name, "before": before, "life": life, "after": None}
        state["created"] += 1
        for k in range(part().get("workers", 2)):
            (ROOT / f"worker-{k}").mkdir()
    write(state)
    return {
        "ok": lambda: say(f"Create request issued for: [{name}]", 0),
        "quota": lambda: say("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProject"
                             "PerZone' has been exceeded. Limit: 0 in zone us-central1-a."),
        "unavailable": lambda: say("ERROR: UNAVAILABLE: The service is currently unavailable."),
    }[answer]()  # fmt: skip


def describe(name: str, flags: dict) -> int:
    state = read()
    it = state["slice"]
    if it is None or it["name"] != name:
        return say(f"ERROR: NOT_FOUND: Resource 'queuedResources/{name}' was not found")
    if it["before"]:
        now = it["before"].pop(0)
        if now == "FAILED":
            it["before"] = ["FAILED"]
    elif steps() < it["life"]:
        now = "ACTIVE"
    else:
        if it["after"] is None:
            lose_workers()
            it["after"] = ["SUSPENDING", "SUSPENDED"]
        now = it["after"][0]
        it["after"] = it["after"][1:] or it["after"]
    write(state)
    print(now)
    return 0


def steps() -> int:
    """Steps of the one run in the bucket."""
    return len(list(ROOT.glob("buckets/**/step-?")))


def delete(name: str, flags: dict) -> int:
    state = read()
    if state["slice"] is None or state["slice"]["name"] != name:
        return say(f"ERROR: NOT_FOUND: {name} was not found")
    lose_workers()
    state["slice"] = None
    write(state)
    return 0


def lose_workers() -> None:
    for home in ROOT.glob("worker-*"):
        for file in home.glob(".selm/*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text()), signal.SIGKILL)  # each is a session of its own
        shutil.rmtree(home, ignore_errors=True)


# --- its workers ----------------------------------------------------------------------------------


def homes(worker: str) -> list[Path]:
    found = sorted(ROOT.glob("worker-*"))
    return found if worker == "all" else [found[int(worker)]]


def ssh(name: str, flags: dict) -> int:
    state = read()
    it = state["slice"]
    state["ssh"] += 1
    write(state)
    if it is None or it["before"] or it["after"] or state["ssh"] <= part().get("deaf", 0):
        return say("ERROR: ssh: connect to host: Connection refused", 255)
    status = 0
    text, deaf_worker, times = part().get("broken", ["", -1, 0])
    for home in homes(flags["worker"]):
        if text in flags["command"] and f"worker-{deaf_worker}" in (home.name, "worker--1"):
            state["broken"] = state.get("broken", 0) + 1
            if state["broken"] <= times:
                write(state)
                status = say("ERROR: ssh: Connection closed by remote host", 255)
                continue
        # A worker has nothing of the environment of the one who calls.
        environment = {
            "HOME": str(home), "PATH": f"{ROOT / 'worker_bin'}:{ROOT / 'bin'}:/usr/bin:/bin",
            "STANDIN": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", flags["command"]], cwd=home, env=environment, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        status = status or done.returncode
    return status


def scp(source: str, target: str, flags: dict) -> int:
    _, _, path = target.partition(":")
    if read()["ssh"] < part().get("deaf", 0):
        return ssh("", flags)
    for home in homes(flags["worker"]):
        if not (home / path).parent.exists():
            return say("scp: no such folder")
        with (home / path).open("wb") as f:  # like scp: an existing file keeps its mode
            f.write(Path(source).read_bytes())
    return 0


# --- the bucket -----------------------------------------------------------------------------------


def local(name: str) -> Path:
    return ROOT / "buckets" / name.removeprefix("gs://") if name.startswith("gs://") else Path(name)


def storage(words: list[str], flags: dict) -> int:
    verb, *names = words
    if names[-1].startswith("gs://not-mine") or names[0].startswith("gs://not-mine"):
        return say("ERROR: HTTPError 403: does not have storage.objects access")
    if verb == "rsync":
        source, target = map(local, names)
        if not source.is_dir():
            return say("ERROR: The following URLs matched no objects or files:")
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        raise SystemExit(f"stand-in: storage {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
