"""The shell scripts, the Slurm job and the KubeRay job, checked without Slurm and Kubernetes."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rankup.grpo.cli.main import parse

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SHELL_SCRIPTS = sorted([*SCRIPTS.glob("**/*.sh"), *SCRIPTS.glob("*.sbatch")])


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_it(script: Path):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.fixture
def slurm_job() -> Path:
    return SCRIPTS / "slurm.sbatch"


def test_the_slurm_job_has_a_help_text_and_exits_outside_of_slurm(slurm_job: Path):
    shown = subprocess.run(["bash", slurm_job, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sbatch run.yaml" in shown.stdout
    refused = subprocess.run(["bash", slurm_job, "run.yaml"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (refused.returncode, refused.stderr.splitlines()) == (
        1,
        ["slurm: this script runs as a Slurm job: sbatch --nodes=2 scripts/slurm.sbatch FILE"],
    )


def test_slurm_reads_all_its_options(slurm_job: Path):
    lines = slurm_job.read_text().splitlines()
    options = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert options and max(options) < first_command  # Slurm stops reading there


def test_the_kuberay_job_has_a_gpu_for_every_worker():
    job = yaml.safe_load((SCRIPTS / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, *words = shlex.split(job["spec"]["entrypoint"])
    options = parse(words)
    assert program == "rankup" and options.resume
    overrides = dict(word.split("=", 1) for word in options.overrides)
    cluster = job["spec"]["rayClusterSpec"]
    gpus = cpus = 0
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        gpus += group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        cpus += group["replicas"] * int(container["resources"]["limits"]["cpu"])
    assert gpus == int(overrides["cluster.workers"])
    assert gpus * float(overrides["cluster.cpus_per_worker"]) <= cpus


def test_all_pods_of_the_kuberay_job_see_the_run_file_and_the_runs_folder():
    job = yaml.safe_load((SCRIPTS / "rayjob.yaml").read_text())
    options = parse(shlex.split(job["spec"]["entrypoint"])[1:])
    folder = dict(word.split("=", 1) for word in options.overrides)["logging.output_dir"]
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert {str(options.file.parent), str(Path(folder).parent)} == set(mounts)
        assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


def test_the_kuberay_job_names_the_ray_of_the_lock():
    job = yaml.safe_load((SCRIPTS / "rayjob.yaml").read_text())
    lock = (SCRIPTS.parent / "requirements" / "cuda.txt").read_text().splitlines()
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}" in lock
