"""What the tests of runs share: the process group of one process, and a log that is closed again."""

import logging

import pytest
import torch.distributed as dist

from guided_diffusion import dist_util, logger


@pytest.fixture
def one_process(monkeypatch):
    """The process group of plain python: rank 0 of 1."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    already = dist.is_initialized()
    dist_util.setup_dist()
    yield
    if not already:
        dist.destroy_process_group()


@pytest.fixture
def log(tmp_path):
    """The log.txt of a configured folder."""
    logger.configure(dir=str(tmp_path / "log"))
    yield tmp_path / "log" / "log.txt"
    ours = logging.getLogger("guided_diffusion")
    for handler in list(ours.handlers):
        ours.removeHandler(handler)
        handler.close()
