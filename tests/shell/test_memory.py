"""The limit of memory is the least of those of the machine, the container and the process."""

from __future__ import annotations

import resource
import subprocess
import sys

import jax
import pytest
from jax.errors import JaxRuntimeError

from selm_jax.shell import memory


def files_of(root, own, text: str, limits: dict[str, str]) -> list[int]:
    own.write_text(text)
    for name, value in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(value + "\n")
    return sorted(int(file.read_text()) for file in memory._of_cgroups(root, own))


@pytest.mark.parametrize(
    "text, limits, expected",
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "300"}, [300]),
        ("0::/a/b\n", {"a/b/memory.max": "100", "a/memory.max": "300"}, [100, 300]),
        ("0::/\n", {"memory.max": "200"}, [200]),
        ("0::/a\n", {}, []),
        (
            "5:cpu:/x\n4:memory:/docker/1\n0::/y\n",
            {"memory/docker/1/memory.limit_in_bytes": "70", "cpu/x/memory.limit_in_bytes": "9"},
            [70],
        ),
    ],
)
def test_each_control_group_above_the_process_counts(tmp_path, text, limits, expected):
    root = tmp_path / "cgroup"
    root.mkdir()
    assert files_of(root, tmp_path / "own", text, limits) == expected


def test_without_control_groups_there_is_no_such_limit(tmp_path):
    assert list(memory._of_cgroups(tmp_path, tmp_path / "absent")) == []


def test_the_limit_of_a_process_counts_and_is_shared_by_its_devices():
    """A limit of this machine's half, so that whatever else limits the process is larger."""
    half = memory.device_limit(jax.devices()[0])[0] * len(jax.local_devices()) // 2
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({half}, {half})); "
        "import jax; from selm_jax.shell.memory import device_limit; "
        "print(*device_limit(jax.devices()[0]), len(jax.devices()))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, *source, devices = ended.stdout.split()
    assert int(size) == half // int(devices)
    assert " ".join(source) == "this process's limit (ulimit -v)"


def test_free_memory_is_within_that_of_the_machine():
    free = memory.free_memory()
    if free is None:
        pytest.skip("this system does not say what is free")
    assert 0 < free < memory._of_machine("MemTotal")


@pytest.mark.parametrize("full", [MemoryError(), JaxRuntimeError("RESOURCE_EXHAUSTED: 8 bytes")])
def test_work_is_done_again_with_less_while_memory_runs_out(full):
    sizes = [8]

    def work() -> int:
        if sizes[-1] > 2:
            raise full
        return sizes[-1]

    def lower(error: Exception) -> None:
        assert error is full
        sizes.append(sizes[-1] // 2)

    assert memory.until_it_fits(work, lower) == 2 and sizes == [8, 4, 2]


def test_other_errors_pass_unchanged_and_lower_nothing():
    def broken():
        raise JaxRuntimeError("INTERNAL: something else")

    def lower(_):
        raise AssertionError("the error was taken for one of memory")

    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        memory.until_it_fits(broken, lower)


KEPT = """
import resource
from selm_jax.shell import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        bytearray(2**25)  # 32 MiB of zeros, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

memory.share_one_heap()
usual = faults()
memory.keep_freed()
faults()
kept, held = faults(), memory.held_now()
memory.release()
returned = held - memory.held_now()
memory.keep_freed(False)
print(usual, kept, returned, faults())
"""


@pytest.mark.skipif(memory._of_glibc("mallopt") is None, reason="the C library is not glibc")
def test_freed_memory_is_kept_until_it_is_released():
    """In a process of its own, whose heap no other test has cut up."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    usual, kept, returned, after = map(int, done.stdout.split())
    pages = 2**25 // resource.getpagesize()
    assert usual >= 4 * pages and after >= 4 * pages, "each array had new pages"
    assert kept < pages
    assert returned >= 0.9 * 2**25


def test_freed_memory_is_returned_once_memory_ran_out(monkeypatch):
    told, errors = [], [MemoryError()]
    monkeypatch.setattr(memory, "keep_freed", told.append)

    def work():
        if errors:
            raise errors.pop()

    memory.until_it_fits(work, lambda _: None)
    assert told == [False]
