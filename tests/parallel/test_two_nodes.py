"""Two agents with a host each, where the machine can make two hosts: one job of tensor 2 x data 2.

The hosts are network namespaces joined by a cable; without the right to make them both agents share this host.
"""

import contextlib
import os
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from icegrt import cli
from tests.helpers import stage_cases as stages
from tests.helpers import tiny_models as tiny
from tests.helpers.ranks import launch

NODES = 2


@contextlib.contextmanager
def hosts():
    """For each node: what to put before its command, its address, and its network interface."""
    names = [f"icegrt{os.getpid()}{letter}" for letter in "ab"]
    cable = [f"v{os.getpid()}{letter}" for letter in "ab"]
    addresses = ["10.231.77.1", "10.231.77.2"]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "delete", name)
            _ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", cable[1], "netns", names[1])
            for name, end, address in zip(names, cable, addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                _ip("-n", name, "link", "set", end, "up")
                _ip("-n", name, "link", "set", "lo", "up")
            hosts_of_nodes = [
                (["ip", "netns", "exec", n], a, e) for n, a, e in zip(names, addresses, cable, strict=True)
            ]
        except (OSError, subprocess.CalledProcessError):
            hosts_of_nodes = [([], "127.0.0.1", "lo")] * NODES
        yield hosts_of_nodes


def _ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True)


def agent(node, host, endpoint, command):
    """One node's torchrun, with two ranks."""
    before, address, interface = host
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    run = ["--nnodes", str(NODES), "--nproc-per-node", "2", "--local-addr", address]
    meet = ["--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", endpoint]
    meet += ["--rdzv-conf", f"is_host={int(node == 0)}"]
    line = [*before, sys.executable, "-m", "torch.distributed.run", *run, *meet, "-m", "icegrt", *command]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def one_process(keys):
    assert cli.main(["ppo", *keys]) == 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_nodes_run_what_one_process_runs(tmp_path):
    home = stages.make_home(tmp_path)
    shared = ["ppo.optimizer.lr=1e-4", "ppo.critic.optimizer.lr=1e-4"]
    launch(1, one_process, stages.ppo_keys(home, tmp_path / "one", *shared))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = stages.ppo_keys(home, tmp_path / "cut", *shared, "ppo.parallel.tensor=2")
    with hosts() as hosts_of_nodes:
        agents = [
            agent(n, host, f"{hosts_of_nodes[0][1]}:{port}", ["ppo", *keys]) for n, host in enumerate(hosts_of_nodes)
        ]
        try:
            outputs = [agent_process.communicate(timeout=500) for agent_process in agents]
        finally:
            for agent_process in agents:
                agent_process.kill()
    assert [agent_process.returncode for agent_process in agents] == [0, 0], outputs
    for n in (1, 2):
        expected_ids, ids = (
            [row["response_ids"] for row in stages.read_jsonl(tmp_path / o / "rollouts" / f"iteration_0000{n}.jsonl")]
            for o in ("one", "cut")
        )
        assert ids == expected_ids
    weights, expected_weights = (load_file(tmp_path / o / "model" / "model.safetensors") for o in ("cut", "one"))
    assert tiny.gap(weights, expected_weights)[0] <= 1e-5
    assert "iteration" not in outputs[1][0], "only rank 0 speaks, and it lives on the first node"
