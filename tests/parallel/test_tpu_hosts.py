"""Hosts of a Cloud TPU and of GKE find each other through the environment and a metadata server.

The tests run a real HTTP server, which answers or does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forked
import jax
import pytest
import yaml
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, cluster

from selm_jax.parallel import multihost
from selm_jax.parallel.multihost import MultihostError

EIGHT = [f"10.164.0.{i}" for i in range(10, 18)]
CLUSTERS = ("SLURM_", "OMPI_", "SELM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_")
JOBSET = Path(__file__).parents[2] / "tpu_setup/gke_jobset.yaml"
# What its controllers say to a container of that JobSet, here to the sixth host.
GKE = {
    "TPU_WORKER_HOSTNAMES": ",".join(f"selm-slice-0-{i}.selm" for i in range(8)),
    "TPU_WORKER_ID": "5", "TPU_SKIP_MDS_QUERY": "true",
}  # fmt: skip


def gce(hosts: list[str], worker: int, **more: str) -> dict[str, str]:
    """The attributes of a TPU VM."""
    told = {"ACCELERATOR_TYPE": "v5litepod-32", "WORKER_ID": str(worker)} | more
    return {
        "agent-worker-number": str(worker),
        "worker-network-endpoints": ",".join(f"unknown:unknown:{host}" for host in hosts),
        "tpu-env": "".join(f"{key}: '{value}'\n" for key, value in told.items()),
    }


@pytest.fixture
def metadata():
    """(its address, its attributes): what it is not given, it does not know."""
    attributes: dict[str, str] = {}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            found = attributes.get(
                self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            )
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write((found or "<!DOCTYPE html> 404: Not Found").encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", attributes
        server.shutdown()


@pytest.fixture
def joins(monkeypatch, metadata):
    """joins(attributes, environment) -> what `initialize` joins as jax finds it: (coordinator,
    processes, process, local devices), or None if it stays alone. No attributes: no server."""
    address, known = metadata
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)  # jax saw chips on the bus
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between questions
    joined = []

    def initialize(**arguments):
        assert arguments == {}, "jax finds out by itself"
        joined.append(
            ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
        )

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(multihost, "_watch", lambda least: None)  # of processes that are not there

    def be(attributes, environment):
        for name in list(os.environ):
            if name.startswith(CLUSTERS):
                monkeypatch.delenv(name)
        given = {"GCE_METADATA_IP": address, "no_proxy": "127.0.0.1"} | environment
        if attributes is None:
            given["GCE_METADATA_IP"] = f"127.0.0.1:{forked.free_port()}"
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        known.update(attributes or {})
        before = dict(os.environ)
        multihost.initialize()
        assert dict(os.environ) == before
        return joined[0] if joined else None

    collectives = jax.config.jax_cpu_collectives_implementation
    yield be
    jax.config.update("jax_cpu_collectives_implementation", collectives)


def test_a_pod_of_eight_hosts_is_eight_processes(joins):
    assert joins(gce(EIGHT, 3), {}) == ("10.164.0.10:8482", 8, 3, None)


def test_a_pod_may_name_its_hosts_without_their_addresses(joins):
    names = [f"t1v-n-0a1b-w-{i}" for i in range(8)]
    given = gce(names, 7) | {"worker-network-endpoints": ",".join(names)}
    assert joins(given, {}) == ("t1v-n-0a1b-w-0:8482", 8, 7, None)


def test_two_slices_are_one_run(joins):
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "10.164.0.2:8080", "MEGASCALE_NUM_SLICES": "2"}
    told = gce(EIGHT, 3, **slices, MEGASCALE_SLICE_ID="1")
    assert joins(told, {}) == ("10.164.0.2:8482", 16, 11, None)


@pytest.mark.parametrize(
    ("attributes", "environment"),
    [
        pytest.param(gce(EIGHT[:1], 0), {}, id="of a pod of one"),
        pytest.param({}, {}, id="no pod"),
        pytest.param(None, {"TPU_SKIP_MDS_QUERY": "1"}, id="no metadata server"),
        pytest.param(
            None, GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, id="GKE"
        ),
    ],
)
def test_a_single_host_is_alone(joins, attributes, environment):
    assert joins(attributes, environment) is None


def test_the_jobsets_hosts_are_one_run_and_need_no_metadata_server(joins):
    (job,) = yaml.safe_load(JOBSET.read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    ports = [each["containerPort"] for each in container["ports"]]
    coordinator, *rest = joins(None, GKE)
    assert rest == [8, 5, None] and job["template"]["spec"]["parallelism"] == 8
    host, _, port = coordinator.partition(":")
    assert host == "selm-slice-0-0.selm" and int(port) in ports


def test_slices_of_gke_are_one_run(joins):
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    slices["MEGASCALE_COORDINATOR_ADDRESS"] = "selm-slice-0-0.selm"
    assert joins(None, GKE | slices) == ("selm-slice-0-0.selm:8482", 16, 13, None)


@pytest.mark.parametrize("environment", [{}, {"TPU_WORKER_HOSTNAMES": "localhost"}])
def test_a_metadata_server_that_does_not_answer_is_named(joins, environment):
    with pytest.raises(
        MultihostError, match="could not be found: .*127.0.0.1.*TPU_SKIP_MDS_QUERY=1"
    ):
        joins(None, environment)


def test_two_processes_join_as_hosts_of_a_pod():
    """As on GKE, except that devices are this machine's and the coordinator's port is free."""
    program = (
        "from selm_jax.parallel import multihost as m; m.initialize(); import jax; "
        "print(m.count(), m.index(), jax.device_count(), m.on_first(lambda: 'the same'))"
    )
    told = GKE | {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "JAX_FORCE_TPU_INIT": "1"}
    told |= {"JAX_COORDINATOR_PORT": str(forked.free_port()), "JAX_PLATFORMS": "cpu"}
    told |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    here = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTERS)}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=here | told | {"TPU_WORKER_ID": str(i)},
            stdout=subprocess.PIPE, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip
    said = [host.communicate(timeout=300)[0].split("\n")[-2] for host in hosts]
    assert said == ["2 0 8 the same", "2 1 8 the same"]
