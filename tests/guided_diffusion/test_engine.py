"""What the scripts share: flags over presets, exit codes, the log, ranks, the stopwatch and the loop over
batches.
"""

import argparse
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from guided_diffusion import dist_util, logger
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.flags.parser import parse_flags, parse_numbers, run_main
from guided_diffusion.guidance import Observation
from guided_diffusion.runs.loop import sample_missing
from guided_diffusion.runs.stopwatch import Stopwatch
from guided_diffusion.runs.store import SampleStore
from guided_diffusion.runs.tally import Tally

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture(autouse=True)
def no_log_is_left_open():
    yield
    ours = logging.getLogger("guided_diffusion")
    for handler in list(ours.handlers):
        ours.removeHandler(handler)
        handler.close()


@pytest.fixture
def log(tmp_path):
    logger.configure(dir=str(tmp_path / "log"))
    return tmp_path / "log" / "log.txt"


# Flags


def parser():
    result = argparse.ArgumentParser(allow_abbrev=False)
    result.add_argument("--preset", default="")
    result.add_argument("--size", type=int, default=1)
    result.add_argument("--scale", type=float, default=1.0)
    return result


PRESETS = {"small": {"size": 2, "scale": 0.5}, "large": {"size": 9}}


@pytest.mark.parametrize(
    ("argv", "size", "scale", "given"),
    [
        ("", 1, 1.0, set()),
        ("--preset small", 2, 0.5, {"preset"}),
        ("--preset large", 9, 1.0, {"preset"}),
        ("--preset small --size 7", 7, 0.5, {"preset", "size"}),
        ("--size 1 --preset small", 1, 0.5, {"preset", "size"}),
        ("--scale 1.0", 1, 1.0, {"scale"}),
    ],
)
def test_written_flags_win_over_the_preset_over_the_defaults(argv, size, scale, given):
    args = parse_flags(parser(), argv.split(), PRESETS)
    assert (args.size, args.scale, args.given) == (size, scale, given)


@pytest.mark.parametrize(
    ("argv", "message"),
    [("--preset tiny", "'tiny'; choose small, large"), ("--siz 3", "--siz"), ("--size x", "--size")],
)
def test_wrong_flags_end_the_program(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(parser(), argv.split(), PRESETS)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, OSError, FileNotFoundError, FloatingPointError])
def test_users_errors_are_one_line_and_exit_code_1(error):
    def main():
        raise error("what\nwas   wrong")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    # sys.exit prints a text to stderr and ends with exit code 1.
    assert caught.value.code == "error: what was wrong"


def test_ctrl_c_is_exit_code_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_defects_keep_their_traceback():
    def main():
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        run_main(main)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1", [1]), ("1,2,5-10", [1, 2, 5, 6, 7, 8, 9, 10]), ("3-3, 0", [3, 0]), ("2,2", [2, 2])],
)
def test_numbers(text, numbers):
    assert parse_numbers(text, "seeds") == numbers


@pytest.mark.parametrize("text", ["", "a", "1,", "--1", "2-1", "1-2-3", "1.5", "1 2"])
def test_numbers_that_are_not_understood(text):
    with pytest.raises(ValueError, match=f"seeds '{text}'"):
        parse_numbers(text, "seeds")


# Log and ranks


def test_log_lines_go_to_the_folder_and_to_stderr_but_not_to_stdout(tmp_path, capsys):
    logger.configure(dir=str(tmp_path / "a" / "b"))
    logger.log("step", 3, 0.5)
    captured = capsys.readouterr()
    assert logger.get_dir() == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "log.txt").read_text() == "step 3 0.5\n"
    assert (captured.out, captured.err) == ("", "step 3 0.5\n")


def test_configured_again_the_old_log_is_left_alone(tmp_path):
    for name in ("a", "b"):
        logger.configure(dir=str(tmp_path / name))
        logger.log(name)
    assert [(tmp_path / name / "log.txt").read_text() for name in ("a", "b")] == ["a\n", "b\n"]


def test_log_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "env"))
    logger.configure()
    assert logger.get_dir() == str(tmp_path / "env")
    assert os.path.isdir(tmp_path / "env")


def test_log_folder_is_else_a_new_one(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    logger.configure()
    assert os.path.dirname(logger.get_dir()) == str(tmp_path)


def test_log_before_configure_goes_to_stderr():
    code = "from guided_diffusion import logger; logger.log('a', 1); print(logger.get_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{done.stdout.strip()}\n", "a 1\n")


def test_plain_python_is_rank_0_of_1(one_process):
    dist_util.setup_dist()
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    gathered = [torch.zeros(2)]
    dist.all_gather(gathered, torch.ones(2)) if dist.get_backend() == "gloo" else gathered[0].add_(1)
    assert torch.equal(gathered[0], torch.ones(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA answers")
def test_device_without_cuda():
    assert dist_util.dev() == CPU


def test_device_by_name():
    assert dist_util.choose_device("cpu") == torch.device("cpu")


def test_device_that_holds_no_numbers():
    with pytest.raises(ValueError, match="--device meta cannot sample; write cpu"):
        dist_util.choose_device("meta")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "none"])
def test_device_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"--device {name} cannot be used here.*cpu, cuda"):
        dist_util.choose_device(name)


def test_no_name_is_this_ranks_device():
    assert dist_util.choose_device("") == dist_util.dev()


# Stopwatch


def test_stopwatch_adds_up_only_what_it_wraps(monkeypatch):
    clock = iter([10.0, 11.5, 20.0, 20.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)
    assert watch.seconds == 0
    add = watch.wrap(lambda a, b=0: a + b)
    assert add(1, b=2) == 3
    assert watch.seconds == 1.5
    add(1)
    assert watch.seconds == 1.75


# The loop over batches


def draw(indices):
    images = torch.stack([torch.full((2, 2, 3), i, dtype=torch.uint8) for i in indices])
    return images, torch.tensor(list(indices))


def test_only_missing_batches_are_drawn(tmp_path, one_process, log):
    store, drawn, ticks = SampleStore(tmp_path / "out", {}, 7, 3), [], []
    store.write(
        range(3, 6), *draw(range(3, 6)), {"seconds": 1.0, "guidance_seconds": 0.0, "skipped_guidance": 0}
    )

    def sample(indices, tick):
        drawn.append(indices)
        ticks.extend(tick() for _ in range(2))
        return draw(indices)

    sample_missing(store, sample, 2, Tally(CPU))
    assert drawn == [range(0, 3), range(6, 7)]
    assert len(ticks) == 4
    with np.load(store.finish()) as npz:
        assert npz["arr_1"].tolist() == list(range(7))
        assert npz["arr_0"][:, 0, 0, 0].tolist() == list(range(7))
    drawn.clear()
    sample_missing(store, sample, 2, Tally(CPU))
    assert drawn == []
    assert "nothing to do" in log.read_text()


def test_guidance_that_was_dropped_is_counted_and_told(tmp_path, one_process, log):
    store, tally = SampleStore(tmp_path / "out", {}, 6, 3), Tally(CPU)

    def sample(indices, tick):
        x = torch.zeros(3, 1, 2, 2)
        tally.observe(
            Observation(
                5,
                None,
                x,
                torch.zeros(3, dtype=torch.int64),
                torch.zeros(3, 10),
                x,
                torch.tensor([True, False, True]),
            )
        )
        return draw(indices)

    sample_missing(store, sample, 1, tally)
    assert "4" in log.read_text() and "non-finite" in log.read_text()
    store.finish()
    assert '"skipped_guidance": 4' in (tmp_path / "out" / "run.json").read_text()


def test_non_finite_gradient_is_named_by_step_and_sample(tmp_path, one_process, log):
    store = SampleStore(tmp_path / "out", {}, 6, 3)

    def sample(indices, tick):
        if indices.start == 3:
            raise NonFiniteError("guidance gradient", [0, 2], 17)
        return draw(indices)

    with pytest.raises(FloatingPointError, match=r"step 17 for sample 3, 5;.*--on_nonfinite skip"):
        sample_missing(store, sample, 1, Tally(CPU))
    assert store.missing() == [range(3, 6)]


# Coming together


def test_processes_meet_under_one_new_name_whatever_an_earlier_attempt_left_in_the_store():
    store, seconds = dist.HashStore(), timedelta(seconds=20)
    names = []
    for _ in range(3):  # the same store again and again, as after torchrun's restarts
        with ThreadPoolExecutor(3) as pool:
            attempt = list(pool.map(lambda rank: dist_util.meet(store, rank, 3, seconds), [2, 1, 0]))
        assert len(set(attempt)) == 1
        names.append(attempt[0])
    assert len(set(names)) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_come_is_waited_for_so_long(rank):
    store = dist.HashStore()
    store.set("word/1", "of an earlier attempt")
    store.set("meeting", "earlier of an earlier attempt")
    with pytest.raises(
        ValueError, match=f"rank {rank} waited 1 s for the 2 processes of this run to come together"
    ):
        dist_util.meet(store, rank, 2, timedelta(seconds=1))
