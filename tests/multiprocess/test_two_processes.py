"""Two processes of four devices each do what one of eight does."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(processes, process, port, out):
    return subprocess.Popen(
        [sys.executable, str(HERE / "worker.py"), *map(str, (processes, process, port))]
        + [str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(workers, seconds=240):
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=seconds)
            assert worker.returncode == 0, output[-4000:]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone, *both = (tmp_path / f"{name}.npz" for name in ("alone", "first", "second"))
    port = free_port()
    pair = [start(2, process, port, out) for process, out in enumerate(both)]
    finish([*pair, start(1, 0, 0, alone)])
    expected = dict(np.load(alone))
    names = {"finetune", "adapt", "maml", "fit", "evaluate"}
    assert {x.split("/")[0] for x in expected} == names
    for out in both:
        found = dict(np.load(out))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name], value, rtol=1e-6, atol=1e-6, err_msg=name
            )
