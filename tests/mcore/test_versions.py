"""`attach` and `routing_batch` on other Megatrons than the installed one: gradients and logged figures.

`make install-megatrons` puts the versions beside the environment. Each is run in a process of its own, with
its folder first on PYTHONPATH. The laws are those of `small_gpt`: after Megatron's schedule of two
micro-batches the gradients of all weights are autograd's of the loss in plain torch, what is logged is what
the loss says, and Megatron's z-loss does not depend on the padding. Bound: relative error below 1e-5, as the
losses at the routers are computed in float32 (found: 6e-7).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("RAMOE_MEGATRONS", ROOT / ".venv"))
"""Holds a folder `megatron-core-VERSION` for each version."""
VERSIONS = re.findall(r"^MEGATRONS := (.+)$", (ROOT / "Makefile").read_text(), re.M)[0].split()
BOUND = 1e-5


def run_on(version: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command on this version of Megatron."""
    place = FOLDER / f"megatron-core-{version}"
    if not place.is_dir():
        pytest.skip(f"megatron-core {version} is not beside the environment: make install-megatrons")
    folders = [place, ROOT, ROOT / "tests/support"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_attach_gives_the_gradients_and_the_log_of_the_reference(version: str) -> None:
    done = run_on(version, str(ROOT / "tests/support/small_gpt.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].partition("+")[0] == version
    assert Path(found["place"]).is_relative_to(FOLDER / f"megatron-core-{version}")
    assert found["gradient"] > 1e-3
    assert found["error"] < BOUND
    for name, value in found["figures"].items():
        assert value > 1e-3, name
        assert found["seen"][name] == pytest.approx(value, rel=BOUND), name
        if not name.startswith("moe/"):
            assert found["table"][name] == pytest.approx(value, rel=BOUND), name
    assert found["left"] == 0  # a report ends in a fresh step
    assert found["z_loss"] > 1
    assert found["z_gradients"] > 0
    assert found["padding"] < BOUND
    assert found["jobs"].keys() == {"taxonomy", "profile", "predict", "finetune", "evaluate", "steer"}
    for refusal in found["jobs"].values():  # before any flag is read
        assert refusal.startswith(f"megatron-core {version}: the jobs need megatron-core>=0.19,<0.21.")
        assert "ramoe_megatron.attach" in refusal
