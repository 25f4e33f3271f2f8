"""Python programs in processes of their own, begun from one that has imported the libraries already.

Half of the time of a small program goes to its imports. A server imports them once for each of the suite's workers,
before anything has run, and a fork of it becomes the program: its own working directory, environment, arguments and
output, as `python` would give it. The package itself is not among them: a program imports the one that it finds.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).parents[1]
# None that brings an OpenMP runtime beside torch's, as scikit-learn does: how many there are is tested.
_LIBRARIES = ("lightning", "hydra", "matplotlib.pyplot")


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_LIBRARIES, __name__])
    return context


class Program:
    """A started program, with the part of `subprocess.Popen` that tests use.

    Args:
        arguments: what would stand behind `python`: a script, `-m module` or `-c code`, and what that is given.
        output: where standard output goes.
        errors: where standard error goes; the same file for both.
        cwd: where it runs.
        environment: its variables.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        output: Path,
        errors: Path,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [str(argument) for argument in arguments]
        variables = dict(os.environ if environment is None else environment)
        self._process = _server().Process(target=_become, args=(command, output, errors, cwd, variables))
        self._process.start()

    def wait(self, timeout: float) -> int:
        """The exit code, negative for a signal: a program that has not ended after these seconds is killed."""
        self._process.join(max(0.0, timeout))
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code


def run_python(
    *arguments: str | Path,
    cwd: Path,
    directory: Path,
    timeout: float = 280,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` would, and give what it printed.

    Args:
        *arguments: see `Program`.
        cwd: where it runs.
        directory: where what it prints is kept meanwhile.
        timeout: seconds.
        environment: its variables.
    """
    output, errors = (directory / f"{name}-{os.urandom(4).hex()}.txt" for name in ("output", "errors"))
    code = Program(arguments, output, errors, cwd, environment).wait(timeout)
    printed = output.read_text(), errors.read_text()
    for path in (output, errors):
        path.unlink()
    return subprocess.CompletedProcess(list(arguments), code, *printed)


def _become(command: list[str], output: Path, errors: Path, cwd: Path, variables: dict[str, str]) -> None:
    """Be the program that `python` with these arguments would be."""
    for path, descriptor in ((output, 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    if command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], str(cwd)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
