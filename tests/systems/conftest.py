import pytest
from samplers import SAMPLERS


@pytest.fixture(params=SAMPLERS, ids=lambda sampler: sampler.name)
def sampler(request):
    """Each row of the table."""
    return request.param


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(row): the folder of a run of its flags with --log_guidance; it must stay as it is."""
    folders = {}

    def run(sampler):
        if sampler.name not in folders:
            folders[sampler.name] = tmp_path_factory.mktemp(f"finished-{sampler.name}")
            sampler.run(folders[sampler.name], "--log_guidance", True)
        return folders[sampler.name]

    return run


@pytest.fixture(scope="session")
def unguided(tmp_path_factory):
    """unguided(row): the same without any classifier."""
    folders = {}

    def run(sampler):
        if sampler.name not in folders:
            folders[sampler.name] = tmp_path_factory.mktemp(f"unguided-{sampler.name}")
            sampler.run(folders[sampler.name], base=sampler.unguided)
        return folders[sampler.name]

    return run
