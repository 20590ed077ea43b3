"""The examples run as their pages say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("launcher", "loss", "says"),
    [
        ((), "vlmfast", "1 process on cpu"),
        (TORCHRUN, "vlmfast", "2 processes on cpu"),
        (TORCHRUN, "eager", "2 processes on cpu"),
    ],
    ids=["one vlmfast", "two vlmfast", "two eager"],
)
def test_train_clip(launcher, loss, says):
    done = run(*launcher, "examples/train_clip.py", "--quick", "--loss", loss)
    assert f"{loss} loss, 12 steps of 64 pairs, {says}" in done.stdout
    numbers = dict(re.findall(r"^  (\S.*?)  +([\d.,]+)", done.stdout, re.MULTILINE))
    assert float(numbers["last loss"]) < float(numbers["first loss"]) < 6
    assert 0 <= float(numbers["zero-shot accuracy"]) <= 100
    assert float(numbers["pairs/s"].replace(",", "")) > 0
    assert "12/12" in done.stderr  # the progress bar
