"""The launch scripts, as far as one machine without scheduler, cloud or accelerator can try them.

That the one for SLURM really trains is tested in tests/run/hosts_test.py.
"""

import math
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from jaxmp.run import cli

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/digits_mlp_float32.py"
SCRIPTS = sorted((ROOT / "scripts").glob("launch_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_launch_script_is_clean_and_says_how_to_use_it(script):
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    head = script.read_text().splitlines()[1:8]
    assert any(f"scripts/{script.name}" in line for line in head)
    assert any("Not tried:" in line for line in head)


def stand_in(place, name):
    """A program of that name which prints its arguments, one a line."""
    (place / name).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (place / name).chmod(0o755)
    return os.environ | {"PATH": f"{place}:{os.environ['PATH']}", "PYTHON": str(place / name)}


def said_by(script, arguments, env):
    command = [ROOT / "scripts" / script, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_the_tpu_script_sends_one_command_to_all_hosts(tmp_path):
    sent = said_by(
        "launch_tpu.sh", ["name", "zone", CONFIG, "--workdir", "a b"], stand_in(tmp_path, "gcloud")
    ).splitlines()
    assert sent[:5] == ["compute", "tpus", "tpu-vm", "ssh", "name"]
    assert "--worker=all" in sent and sent[-2] == "--command"
    # What every host then runs, in a home with a stand-in for its interpreter.
    (tmp_path / "jaxmp/.venv/bin").mkdir(parents=True)
    stand_in(tmp_path / "jaxmp/.venv/bin", "python")
    ran = subprocess.run(
        ["bash", "-c", sent[-1]], env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.splitlines() == ["scripts/train.py", CONFIG, "--workdir", "a b"]


def test_the_gpu_script_takes_all_gpus_unless_told(tmp_path):
    env = stand_in(tmp_path, "python")
    said = said_by("launch_gpu.sh", [CONFIG, "--steps", "5"], env).split()
    assert said == ["scripts/train.py", CONFIG, "--mesh", "data=-1", "--steps", "5"]
    said = said_by("launch_gpu.sh", [CONFIG, "--mesh=data=2"], env).split()
    assert said == ["scripts/train.py", CONFIG, "--mesh=data=2"]


def test_the_slurm_script_queues_a_preempted_run_again(tmp_path):
    env = stand_in(tmp_path, "scontrol") | {"SLURM_JOB_ID": "7", "PYTHON": "python"}
    for code, told in ((0, ""), (1, ""), (75, "requeue\n7\n")):
        (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
        (tmp_path / "srun").chmod(0o755)
        done = subprocess.run(
            [ROOT / "scripts" / "launch_slurm.sh", CONFIG],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, told)


def test_the_manifest_for_gke_fits_its_slice_and_runs_a_config():
    manifest = yaml.safe_load((ROOT / "scripts" / "launch_gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [job] = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    limit = int(container["resources"]["limits"]["google.com/tpu"])
    assert spec["parallelism"] == spec["completions"] == chips // limit
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    assert pod["restartPolicy"] == "Never"
    program, script, path = container["command"]
    assert (program, script) == ("python", "scripts/train.py")
    config, _ = cli.parse([str(ROOT / path), *container["args"]])
    assert config.mesh == "data=-1" and config.batch_size % chips == 0
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.workdir.startswith(mounts["runs"] + "/")
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [cli.EXIT_USAGE]
