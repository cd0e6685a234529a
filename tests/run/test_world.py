"""The environment variables that define a process's rank."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from umt_fast.config import ConfigError
from umt_fast.run.lost_rank import is_lost_rank
from umt_fast.run.world import World, advise_restarts, agree_on_attempt, read_environment, shorten

MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
PAIR = {"RANK": "0", "WORLD_SIZE": "2", **MASTER}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "0"}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER}, (3, 4, 1)),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1, 0)),
        ({"SLURM_NTASKS": "8"}, (0, 1, 0)),  # a shell of salloc
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2", **MASTER}, (1, 2, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", **MASTER}, (1, 2, 0)),
    ],
)
def test_ranks_from_the_environment(environment, expected):
    assert read_environment(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK = 1, but WORLD_SIZE is not set: start with torchrun, or unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK is not set: start with torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE = 'abc' is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE = 2, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MASTER}, "RANK = 2, but WORLD_SIZE = 2"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM started 2 tasks.* start one torchrun per node"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"mpirun started 2 processes \(OMPI_COMM_WORLD_SIZE\), but RANK is not set"),
        ({"PMI_SIZE": "4"}, r"mpirun started 4 processes \(PMI_SIZE\)"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = -1: start with torchrun"),
        ({**PAIR, "MASTER_PORT": "abc"}, "MASTER_PORT = 'abc' is not a number"),
        ({**PAIR, "MASTER_PORT": "70000"}, "MASTER_PORT = 70000 is not a port"),
        ({"RANK": "9" * 5000}, "RANK = '9{40}' is not a number"),
    ],
)
def test_errors_name_the_variables_that_are_missing_or_wrong(environment, message):
    with pytest.raises(ConfigError, match=message):
        read_environment(environment)


def test_only_elastic_runs_of_several_nodes_are_advised():
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (advise_restarts(elastic) or "")
    for name, value in (
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
        ("GROUP_WORLD_SIZE", "1"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"),
    ):
        assert advise_restarts({**elastic, name: value}) is None


def test_ranks_agree_on_an_attempt_in_a_store_of_earlier_ones():
    """Some of the earlier ranks died before they found the others."""
    store, rng = dist.HashStore(), random.Random(0)

    def join(rank: int, delay: float) -> str:
        time.sleep(delay)
        return agree_on_attempt(store, rank, 3, timeout=20)

    names = []
    for _ in range(6):
        for rank in rng.sample(range(3), 2):
            store.set(f"umt_fast/start/{rank}", "dead")
        with ThreadPoolExecutor() as pool:
            found = set(pool.map(join, range(3), [rng.uniform(0, 0.2) for _ in range(3)]))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 6
    with pytest.raises(dist.DistStoreError, match="did not find each other"):
        agree_on_attempt(store, 1, 3, timeout=0.2)


def test_a_message_of_gloo_is_shortened():
    message = "[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused"
    assert shorten(RuntimeError(message)) == "Connection closed by peer [127.0.0.1]:1"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("[/a/b.cpp:1] Rank 1 failed to pass monitoredBarrier in 2000 ms", "rank 1 does not answer"),
        ("Ranks 1, 3 failed to pass monitoredBarrier in 2000 ms", "rank 1, 3 does not answer"),
        (
            "Rank 1 successfully reached monitoredBarrier, but received errors while waiting for send/recv from rank 0."
            " Please check rank 0 logs for faulty rank.",
            "rank 0 does not answer",
        ),
    ],
)
def test_the_rank_that_does_not_answer_is_named(monkeypatch, message, says):
    def barrier(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(dist, "monitored_barrier", barrier)
    assert World(1, 4, torch.device("cpu")).find_lost() == says


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection reset by peer", True),
        ("Timed out waiting 6000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),  # what a stopped rank gave, seen in a soak
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_of_a_lost_rank_differ_from_others(message, lost):
    assert is_lost_rank(RuntimeError(message)) == lost
