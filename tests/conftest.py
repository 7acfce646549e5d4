"""One thread for each of the workers (pytest-xdist): small tensors gain nothing by more. And a device."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def pytest_addoption(parser):
    parser.addoption(
        "--device", help="of the golden networks, such as cuda: pytest --device cuda tests/test_golden_*"
    )


@pytest.fixture(autouse=True)
def device(request):
    """Without --device there is nothing to do. Float32 is then really float32: TF32 is off."""
    if not (name := request.config.getoption("--device")):
        return (yield)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.device(name):
        yield
