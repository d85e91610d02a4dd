"""The Kubernetes jobs that `dus heal --print-job` prints, held against the schemas of the API."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("nodes", ["1", "4"])
def test_a_printed_job_is_what_kubernetes_takes(nodes: str, tmp_path: Path) -> None:
    line = ("heal", "out", "--data", "a.jsonl", "--nproc-per-node", "8", "--nnodes", nodes)
    job = subprocess.run(
        [sys.executable, "-m", "dus_cli", *line, "--print-job", "k8s"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (tmp_path / "job.yaml").write_text(job)
    validator = Path(sys.executable).with_name("kubernetes-validate")
    done = subprocess.run(
        [validator, "--strict", tmp_path / "job.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "passed for resource job/dus-heal against version 1.37" in done.stdout + done.stderr
