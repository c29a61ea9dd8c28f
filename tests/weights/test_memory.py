"""The cost of loading: host memory beyond the parameters, and the bytes each process reads.

Both are measured in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forked import free_port
from safetensors.numpy import load_file, save_file

from selm_jax.models.families import from_hf
from selm_jax.weights.files import _header, stored_like
from selm_jax.weights.names import tensors

REPO = Path(__file__).parents[2]
HF = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def child(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip


def forced(devices: int) -> str:
    return f"--xla_force_host_platform_device_count={devices}"


# --- memory ---------------------------------------------------------------------------------------

LOAD = """
import dataclasses, json, sys, tempfile
from pathlib import Path
import flax.linen as nn, jax, jax.numpy as jnp
from selm_jax.models.decoder import abstract_params
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.weights.huggingface import load, save

folder, mesh = Path(sys.argv[1]), json.loads(sys.argv[2])
config = read_config(folder)
where = mesh and shardings(abstract_params(config), make_mesh(mesh), TRAINING)
# Pay one-time costs (compiler, thread pools) beforehand, with a small model.
small = dataclasses.replace(
    config, embed=64, heads=4, kv_heads=4, head_dim=16, mlp=128, vocab_size=64
)
with tempfile.TemporaryDirectory() as f:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), nn.unbox(abstract_params(small)))
    save(zeros, small, Path(f))
    load(Path(f), small, shardings=where)
print("ready", flush=True)
sys.stdin.readline()
params = load(folder, config, shardings=where)
print(sum(x.nbytes for x in jax.tree.leaves(params)), flush=True)
sys.stdin.readline()
"""


def held(pid: int) -> int:
    """Bytes of the process's own memory, without pages of mapped files.

    Those are the checkpoint as it lies in the system's page cache. They count as resident while
    they are mapped, but the system drops them when it wants to.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return sum(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [None, [1, 2, 2]], ids=["one device", "four devices"])
@pytest.mark.slow
def test_memory_above_the_parameters(tmp_path, mesh, stored):
    """A checkpoint of 1.2 GB of parameters; the largest tensors, of 64 MiB, are those of layers."""
    rows = tensors(from_hf(HF)).values()
    layers = range(HF["num_hidden_layers"])
    names = [(r.name.format(i), r) for r in rows for i in (layers if r.stacked else (0,))]
    entries = {name: stored_like(r.stored_shape, np.dtype(stored)) for name, r in names}
    (tmp_path / "config.json").write_text(json.dumps(HF))
    with (tmp_path / "model.safetensors").open("wb") as file:
        header = _header(entries)
        file.write(header)
        file.truncate(len(header) + sum(entry.bytes for entry in entries.values()))  # zeros
    largest = max(int(np.prod(entry.shape)) * 4 for entry in entries.values())

    # The C library keeps freed blocks of up to 32 MB for itself; it is told not to, for it is
    # asked here what the loader holds.
    process = child(
        LOAD, str(tmp_path), json.dumps(mesh), XLA_FLAGS=forced(4), PJRT_NPROC="16",
        MALLOC_MMAP_THRESHOLD_="1000000",
    )  # fmt: skip
    with process as p:
        assert p.stdin and p.stdout and p.stdout.readline() == "ready\n"
        before = held(p.pid)
        p.stdin.write("\n")
        p.stdin.flush()
        os.set_blocking(p.stdout.fileno(), False)
        peak, answer = before, ""
        while not answer and p.poll() is None:
            peak = max(peak, held(p.pid))
            answer = p.stdout.readline()
            time.sleep(0.001)
        p.stdin.close()
    size = int(answer)
    assert size == sum(int(np.prod(entry.shape)) * 4 for entry in entries.values()) > 10**9
    above = (peak - before - size) / largest
    print(f"{stored}, {mesh}: {above:.2f} times the largest tensor above the parameters")
    assert above < 2


# --- several processes ----------------------------------------------------------------------------

SHARE = """
import json, sys
from pathlib import Path
import jax
from flax.traverse_util import flatten_dict
address, me, folder, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(address, num_processes=2, process_id=me)
from selm_jax.models.decoder import abstract_params
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.weights import files
from selm_jax.weights.huggingface import load, save

read, plain = [], files.Checkpoint.read
def counting(self, name, cuts=()):
    found = plain(self, name, cuts)
    if found.ndim == 2:
        read.append(found.nbytes)
    return found
files.Checkpoint.read = counting
config = read_config(folder)
where = shardings(abstract_params(config), make_mesh((1, 4, 2)), TRAINING)
params = load(folder, config, dtype="float16", shardings=where)
mine = sum(s.data.nbytes for x in jax.tree.leaves(params) if x.ndim > 2 or x.shape[0] == 96
           for s in x.addressable_shards)
(out / str(me)).mkdir()
save(params, config, out / str(me))
ours, wrong = sum(read), ""
try:
    load(Path(sys.argv[5]), config, shardings=where)
except files.WeightsError as e:
    wrong = str(e)
print(json.dumps([ours, mine, wrong]), flush=True)
"""


def test_each_of_two_processes_reads_its_own_half(tmp_path):
    """Two processes of four devices: each reads the bytes of its shards, and both save the whole. A
    number that is none is in the half of one of them, and both name its tensor."""
    folder = REPO / "tests" / "golden" / "families" / "phi-3-4k"
    spoiled = shutil.copytree(folder, tmp_path / "spoiled")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = np.nan
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    address = f"127.0.0.1:{free_port()}"
    processes = [
        child(SHARE, address, str(me), str(folder), str(tmp_path), str(spoiled),
              XLA_FLAGS=forced(4))
        for me in range(2)
    ]  # fmt: skip
    found = [json.loads(p.communicate(timeout=100)[0].splitlines()[-1]) for p in processes]
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for read, mine, wrong in found:
        assert f"contain NaN or infinity:\n  {name}, in model.safetensors" in wrong
        assert read == mine
        assert abs(read - (len(whole) - header) / 2) < 1000  # but for the norms, which all have
    before = load_file(folder / "model.safetensors")
    for me in range(2):
        after = load_file(tmp_path / str(me) / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(before[n].tobytes() == after[n].tobytes() for n in before)
