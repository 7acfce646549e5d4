"""Devices by name, and the process group of plain python."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from forked import Forked

from guided_diffusion import dist_util


@pytest.fixture
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    dist_util.setup_dist()
    yield
    dist.destroy_process_group()


def test_plain_python_is_rank_0_of_1(one_process):
    dist_util.setup_dist()  # a second time does nothing
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    gathered, parameters = [torch.zeros(2)], [torch.nn.Parameter(torch.ones(2))]
    dist.all_gather(gathered, torch.ones(2))
    dist_util.sync_params(parameters)
    assert torch.equal(gathered[0], torch.ones(2)) and torch.equal(parameters[0].data, torch.ones(2))


SYNC = """
import torch
from guided_diffusion import dist_util
dist_util.setup_dist()
parameters = [torch.nn.Parameter(torch.full((2,), float(torch.distributed.get_rank() + 5)))]
dist_util.sync_params(parameters)
print(parameters[0].tolist())
"""


def test_parameters_are_those_of_rank_0_on_all_processes(tmp_path):
    group = []
    for rank in "012":
        ranks = {"RANK": rank, "SIZE": "3", "LOCAL_RANK": rank, "LOCAL_SIZE": "3"}
        variables = {f"OMPI_COMM_WORLD_{name}": value for name, value in ranks.items()}
        environment = {**os.environ, "TMPDIR": str(tmp_path), **variables}
        group.append(Forked([sys.executable, "-c", SYNC], environment))
    assert [process.communicate(timeout=120) for process in group] == [("[5.0, 5.0]\n", "")] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA answers")
def test_device_without_cuda():
    assert dist_util.dev() == torch.device("cpu")


def test_a_device_by_name_or_this_ranks():
    assert dist_util.choose_device("cpu") == torch.device("cpu")
    assert dist_util.choose_device("") == dist_util.dev()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta", "--device meta cannot sample; write cpu"),
        *((name, f"--device {name} cannot be used here.*cpu, cuda") for name in ("gpu", "cuda:99", "none")),
    ],
)
def test_a_device_that_is_not_there_or_holds_no_numbers(name, message):
    with pytest.raises(ValueError, match=message):
        dist_util.choose_device(name)
