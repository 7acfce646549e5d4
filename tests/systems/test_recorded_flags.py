"""--config run.json: a run's flags given back to its script."""

import json

import pytest
from helpers import call
from samplers import SAMPLERS, SCRIPTS, manifest

from guided_diffusion.flags.fields import parse
from guided_diffusion.runs.systems import SYSTEMS

OF_SCRIPT = {"classifier_sample": SYSTEMS["adm"], "edm_sample": SYSTEMS["edm"], "dit_sample": SYSTEMS["dit"]}
# One row of each script.
FIRST = list({sampler.script: sampler for sampler in reversed(SAMPLERS)}.values())
each_script = pytest.mark.parametrize("sampler", FIRST, ids=lambda sampler: sampler.name)
PLACES = {"preset", "config", "out", "log_dir", "overwrite", "device", "dry_run"}


def parsed(sampler, *argv):
    system = OF_SCRIPT[sampler.script]
    return parse(system.config, None, system.presets, [str(word) for word in argv])


@each_script
def test_a_record_given_back_is_the_configuration_that_was_run(sampler, finished, tmp_path):
    folder = finished(sampler)
    recorded = {**manifest(folder)["settings"], **manifest(folder)["not_compared"]}
    for path in (folder / "run.json", folder):
        config = parsed(sampler, "--config", path, "--out", tmp_path)
        flags = {name: value for name, value in config.record().items() if name not in PLACES}
        assert {name: recorded[name] for name in flags} == json.loads(
            json.dumps({name: "inf" if value == float("inf") else value for name, value in flags.items()})
        )
        assert config.folder == tmp_path
    assert parsed(sampler, "--config", folder, "--batch_size", 7).batch_size == 7


def test_flags_on_top_mean_what_they_do_on_a_preset(finished):
    config = parsed(FIRST[0], "--config", finished(FIRST[0]), "--steps", 5)
    assert config.steps == 5 and config.record().get("timestep_respacing", "5") == "5"


@each_script
def test_what_is_no_run_of_the_script_is_one_line(sampler, finished, tmp_path):
    (tmp_path / "other.json").write_text('{"settings": {"colour": "red"}}')
    (tmp_path / "none.json").write_text("[]")
    for name, message in {
        "other.json": "is of another script, or version: there is no --colour here",
        "none.json": "was not written by a run: give its run.json",
        "nothing.json": "no such file; give the run.json of a run",
    }.items():
        result = call(SCRIPTS[sampler.script].main, ["--config", tmp_path / name])
        assert result.code == 1 and message in result.err and str(tmp_path / name) in result.err
        assert len(result.err.strip().splitlines()) == 1
