"""Processes that start at once: each is a fork of one that has imported all that our scripts import, which
takes seconds. For tests of what a script does in a process of its own, not of how it starts.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile

import pytest
import torch.distributed.run
from helpers import environment

_CONTEXT = multiprocessing.get_context("forkserver")
# The server leaves out what is not installed. An optimizer imports torch._dynamo at its first step.
_SCRIPTS = ["classifier_sample", "edm_sample", "dit_sample", "image_train", "classifier_train"]
_CONTEXT.set_forkserver_preload(
    [
        "forked",
        *_SCRIPTS,
        "torch._dynamo",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "diffusers.models",
    ]
)


class Forked:
    """As subprocess.Popen of [python, SCRIPT, FLAGS...], of [python, -c, CODE, WORDS...], or of torchrun,
    [python, -m, torch.distributed.run, ...], whose processes are forks then too. What they write is kept for
    `communicate`. The end of a `with` kills what still runs.
    """

    def __init__(self, command, env=None, cwd=None, **_):
        self.args = [*map(str, command)]
        self._streams = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._streams]
        variables = dict(os.environ) if env is None else env
        self._process = _CONTEXT.Process(
            target=_run, args=(self.args[1:], variables, cwd or os.getcwd(), names)
        )
        with pytest.MonkeyPatch.context() as patch:  # for the server, where this is the first
            for name, value in {**environment(), "PYTHONPATH": os.pathsep.join(sys.path)}.items():
                patch.setenv(name, value)
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, _=None, timeout=None):
        self.wait(timeout)
        return tuple(file.read() for file in self._streams)

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        self._process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.wait()
        for file in self._streams:
            file.close()


def run(command, cwd=None, **variables):
    """(stdout, stderr) of a process that must end well."""
    with Forked(command, {**environment(), **variables}, cwd) as process:
        said = process.communicate(timeout=300)
    assert process.returncode == 0, said[1]
    return said


def _run(words, variables, folder, streams):
    for descriptor, name in enumerate(streams, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # as in any other process
    if words[:2] != ["-m", "torch.distributed.run"]:
        return _run_code(*words)
    launcher = torch.distributed.run
    launch = launcher.elastic_launch

    def launch_forks(config, entrypoint):
        config.start_method = "fork"
        return launch(config, _run_code)

    launcher.elastic_launch = launch_forks
    launcher.main(words[2:])


def _run_code(*words):
    """In a process that torchrun forks the signals have torchrun's handlers, and the words begin with -u."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules.pop("_beside", None)  # what it does belongs to the start of a script
    sys.argv = [word for word in words if word != "-u"]
    if sys.argv[0] == "-c":
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
