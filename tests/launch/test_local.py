"""launch.local as a shell sees it: output, exit codes, signals, restarts, with tiny commands and with real jobs; the templates."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local

ROOT = Path(__file__).parents[2]
LOCAL = [sys.executable, "-m", "launch.local"]


def run(processes: int, script: str, *flags: str, timeout: float = 60) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a shell script, which knows its number as $I."""
    command = [*LOCAL, f"--processes={processes}", *flags, "--", "sh", "-c", f"I=$MOE_JAX_PROCESS_ID; {script}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    return done.returncode, done.stdout, done.stderr


def messages(stderr: str) -> list[str]:
    """What launch.local said about what it did, without numbers that differ."""
    said = [line.removeprefix("launch.local: ") for line in stderr.splitlines() if line.startswith("launch.local: ")]
    return [re.sub(r" at 127.*| after [\d.]+ s", "", line) for line in said]


# --- tiny commands ------------------------------------------------------------------------------------------------------------


def test_output_of_process_0_is_plain_and_others_are_marked():
    code, out, err = run(
        3, 'echo "out $I"; echo "err $I" >&2; printf "[Gloo] Rank [Gloo] Rank 1 greets\\n0 is connected to 7 peer ranks. So\\nno end $I"'
    )
    assert code == 0
    assert out == "out 0\nno end 0\n"
    assert sorted(line for line in err.splitlines() if "launch.local" not in line) == ["[1] err 1", "[2] err 2", "err 0"]
    assert messages(err) == ["started 3 processes that meet"]


def test_verbose_shows_all():
    _, out, err = run(2, 'echo "out $I"', "--verbose")
    assert sorted(out.splitlines()) == ["[1] out 1", "out 0"]


def test_the_first_failure_ends_the_others_and_is_the_exit_code():
    code, out, err = run(3, 'if [ $I = 1 ]; then for n in 1 2 3; do echo "step $n"; done; sleep 0.2; exit 7; fi; echo here; exec sleep 60')
    assert code == 7
    assert out == "here\n"
    assert "[1] step 1\n[1] step 2\n[1] step 3\n" in err, "the last words of the process that failed"
    assert messages(err)[1:] == ["process 1 ended with exit code 7; ending the other 2"]


def test_a_process_ended_by_a_signal():
    code, _, err = run(2, "[ $I = 0 ] && kill -9 $$; exec sleep 60")
    assert code == 128 + 9
    assert messages(err)[1:] == ["process 0 was ended by SIGKILL; ending the other 1"]


def test_the_deaf_are_killed_after_the_grace():
    began = time.monotonic()
    code, _, _ = run(2, "[ $I = 1 ] && { sleep 0.5; exit 1; }; trap '' TERM; while :; do sleep 0.1; done", "--grace=0.5")
    assert code == 1 and time.monotonic() - began < 20


def test_restarts_are_counted(tmp_path):
    """Fails twice, then ends well; every start has another port."""
    script = f"[ $I = 1 ] || exit 0; echo $MOE_JAX_COORDINATOR >> {tmp_path}/ports; [ $(wc -l < {tmp_path}/ports) = 3 ] || exit 9"
    code, _, err = run(2, script, "--max_restarts=3")
    assert code == 0
    assert [line for line in messages(err) if "restart" in line] == ["restart 1 of 3", "restart 2 of 3"]
    ports = (tmp_path / "ports").read_text().split()
    assert len(ports) == len(set(ports)) == 3
    assert all(20_000 <= int(port.removeprefix("127.0.0.1:")) < 32_000 for port in ports)


def test_restarts_run_out():
    code, _, err = run(2, "[ $I = 0 ] || exit 9; exec sleep 60", "--max_restarts=1")
    assert code == 9 and messages(err).count("restart 1 of 1") == 1


@pytest.mark.parametrize("own", [2, 3, 4, 75])
def test_codes_that_are_not_restarted(own):
    code, _, err = run(2, f"exit {own}", "--max_restarts=5")
    assert code == own and "restart" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_handed_on(number, tmp_path):
    """Each process gets it once, stops as it likes, and the job is resumable: no restart. Not a shell, which may count a signal that met its child too."""
    code = f"""
import os, signal, sys, time
def note(name):
    with open(r'{tmp_path}/' + name, 'a') as file: print(os.environ['MOE_JAX_PROCESS_ID'], file=file)
def stop(*_):
    note('got')
    time.sleep(0.2)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(number, stop)
note('up')
time.sleep(60)
"""
    command = [*LOCAL, "--processes=3", "--max_restarts=2", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as job:
        wait_until(lambda: (tmp_path / "up").exists() and len((tmp_path / "up").read_text().split()) == 3)
        job.send_signal(number)
        _, err = job.communicate(timeout=20)
    assert job.returncode == 75
    assert sorted((tmp_path / "got").read_text().split()) == ["0", "1", "2"]
    assert "restart" not in err


def test_nobody_outlives_a_killed_launcher(tmp_path):
    script = f"echo $$ > {tmp_path}/$MOE_JAX_PROCESS_ID; exec sleep 60"
    with subprocess.Popen([*LOCAL, "--processes=2", "--", "sh", "-c", script], cwd=ROOT) as job:
        wait_until(lambda: all((tmp_path / str(index)).exists() and (tmp_path / str(index)).read_text().strip() for index in range(2)))
        pids = [int((tmp_path / str(index)).read_text()) for index in range(2)]
        assert all(alive(pid) for pid in pids)
        job.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("name", ["python", "python3"])
def test_python_is_the_one_that_runs_the_launcher(name):
    command = [*LOCAL, "--processes=1", "--", name, "-c", "import sys; print(sys.executable)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PATH": "/nowhere"})
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr


def test_usage():
    done = subprocess.run([*LOCAL, "--processes=2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: no command")
    done = subprocess.run([*LOCAL, "--processes=2", "--", "no-such-command"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot start no-such-command" in done.stderr


def alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody waits for has ended."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_environment():
    base = {"XLA_FLAGS": "--xla_a=1", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "4,5,6,7,8"}
    own = local.environment(base, 1, 2, 25000, 3)
    assert own["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=3"
    assert own["JAX_PLATFORMS"] == "cpu" and own["HOME"] == "/h"
    assert [own[name] for name in ("MOE_JAX_COORDINATOR", "MOE_JAX_NUM_PROCESSES", "MOE_JAX_PROCESS_ID")] == ["127.0.0.1:25000", "2", "1"]
    assert own["CUDA_VISIBLE_DEVICES"] == "6,7"
    plain = local.environment({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda"}, 0, 2, 25000, None)
    assert plain["CUDA_VISIBLE_DEVICES"] == "0" and plain["JAX_PLATFORMS"] == "cuda" and "XLA_FLAGS" not in plain


# --- real jobs ----------------------------------------------------------------------------------------------------------------


def job(folder: Path, processes: int, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    command = [*LOCAL, f"--processes={processes}", "--devices_per_process=2", *launcher, "--"]
    return [*command, sys.executable, "-m", "tests.distributed_job", f"--folder={folder}", *flags]


def total(devices: int, steps: int) -> float:
    """What the job's total is after `steps`: in each, every device adds its number and the step's."""
    return sum(device + step for step in range(steps) for device in range(devices))


def saved(folder: Path) -> dict:
    return json.loads((folder / "saved.json").read_text()) if (folder / "saved.json").exists() else {"step": 0}


def kill_and_come_back(folder: Path, victims: list[int], processes: int, between: int) -> str:
    """Kills one process after another, each when the job has gone on by some steps; checks the total and gives stderr."""
    steps = between * (len(victims) + 1)
    command = job(folder, processes, f"--steps={steps}", "--sleep=0.1", launcher=(f"--max_restarts={len(victims)}",))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launched:
        pid = 0
        for number, victim in enumerate(victims, 1):
            goal = number * between
            wait_until(lambda goal=goal: saved(folder)["step"] >= goal)
            before, pid = pid, int((folder / f"pid{victim}").read_text())
            assert pid != before, "the job did not start anew"
            os.kill(pid, signal.SIGKILL)
        out, err = launched.communicate(timeout=200)
    assert launched.returncode == 0, err
    assert saved(folder) == {"step": steps, "total": total(2 * processes, steps)}
    assert f"total {total(2 * processes, steps):g}" in out
    assert messages(err).count(f"restart {len(victims)} of {len(victims)}") == 1
    return err


def test_the_coordinator_is_killed_and_the_job_comes_back(tmp_path):
    err = kill_and_come_back(tmp_path, [0], processes=2, between=4)
    assert "process 0 was ended by SIGKILL" in err


@pytest.mark.slow
def test_an_error_of_process_0_is_everybodys(tmp_path):
    """One line and the error's exit code, at once, and no restart."""
    done = subprocess.run(
        job(tmp_path, 2, "--fail=DataError", launcher=("--max_restarts=2",)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "error (process 0): as asked in step 2\n" in done.stderr
    assert "Traceback" not in done.stderr and "restart" not in done.stderr
    assert saved(tmp_path) == {"step": 2, "total": total(4, 2)}


def test_stopped_together_and_resumed(tmp_path):
    command = job(tmp_path, 2, "--steps=500", "--sleep=0.05")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launched:
        wait_until(lambda: saved(tmp_path)["step"] >= 2)
        launched.send_signal(signal.SIGTERM)
        _, err = launched.communicate(timeout=60)
    assert launched.returncode == 75, err
    steps = saved(tmp_path)["step"] + 2
    done = subprocess.run(job(tmp_path, 2, f"--steps={steps}"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2 (launch.local), 2 of 4 devices" in done.stderr
    assert done.stdout.split()[:2] == ["step", f"{steps - 1}:"], "it went on where it was stopped"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills(tmp_path):
    """Every process is killed several times, the coordinator among them, and the job ends with the same total."""
    kill_and_come_back(tmp_path, [0, 1, 2, 0, 2, 1, 0, 1, 2, 0], processes=3, between=5)


# --- the templates ------------------------------------------------------------------------------------------------------------

TEMPLATES = ROOT / "launch" / "templates"

# A JobSet as far as the template uses it: {key: what its value is}; a list holds what each of its items is; "key?" may be absent.
COUNT, NAME, TEXT = "count", "name", "text"
CONTAINER = {
    "name": NAME,
    "image": TEXT,
    "workingDir": TEXT,
    "command": [TEXT],
    "env": [{"name": TEXT, "value": TEXT}],
    "resources": {"limits": {"google.com/tpu": COUNT}},
    "volumeMounts": [{"name": NAME, "mountPath": TEXT}],
}
POD = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": COUNT,
    "nodeSelector": {"cloud.google.com/gke-tpu-accelerator": NAME, "cloud.google.com/gke-tpu-topology": TEXT},
    "containers": [CONTAINER],
    "volumes": [{"name": NAME, "persistentVolumeClaim": {"claimName": NAME}}],
}
JOB = {
    "completionMode": "Indexed",
    "completions": COUNT,
    "parallelism": COUNT,
    "backoffLimit": COUNT,
    "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {"containerName": NAME, "operator": "In", "values": [COUNT]}}]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": NAME, "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": TEXT}},
    "spec": {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": COUNT, "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]},
        "replicatedJobs": [{"name": NAME, "replicas": COUNT, "template": {"spec": JOB}}],
    },
}


def misfits(value, schema, where: str = "") -> list[str]:
    """Where a value is not what the schema says."""
    if isinstance(schema, dict):
        if not isinstance(value, dict) or set(value) != set(schema):
            return [f"{where}: {value if not isinstance(value, dict) else sorted(set(value) ^ set(schema))}"]
        return [text for key in schema for text in misfits(value[key], schema[key], f"{where}.{key}")]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: {value}"]
        return [text for number, item in enumerate(value) for text in misfits(item, schema[0], f"{where}[{number}]")]
    fits = {
        COUNT: lambda: type(value) is int and value >= 0,
        NAME: lambda: isinstance(value, str) and re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value),
        TEXT: lambda: isinstance(value, str) and value and "$" not in value,
    }
    return [] if fits.get(schema, lambda: value == schema)() else [f"{where}: {value}"]


def jobset() -> tuple[dict, dict[str, str]]:
    """The YAML with the values of its own export lines, as envsubst fills them in; and these values."""
    import yaml

    text = (TEMPLATES / "gke_jobset.yaml").read_text()
    values = dict(pair.split("=", 1) for line in re.findall(r"^#   export (.*)$", text, re.M) for pair in line.split())
    body = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    assert set(re.findall(r"\$\{(\w+)\}", body)) == set(values), "every variable is named at the top, and used"
    return yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda name: values[name[1]], text)), values


def passed_flags(arguments: list[str]) -> list[str]:
    assert "launch.train" in arguments
    return [word.split("=")[0] for word in arguments[arguments.index("launch.train") + 1 :]]


@pytest.fixture(scope="module")
def train_flags() -> set[str]:
    text = subprocess.run([sys.executable, "-m", "launch.train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {f"--{name}" for name in re.findall(r"^  --(?:\[no\])?(\w+)", text, re.M)}


def fake(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def with_fakes(folder: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{folder}:{os.environ['PATH']}", **env}
    return subprocess.run(["bash", str(TEMPLATES / script), *arguments], capture_output=True, text=True, check=False, env=env)


def test_the_jobset_is_one(train_flags):
    found, values = jobset()
    assert misfits(found, JOBSET) == []
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    flags = passed_flags(container["command"])
    assert set(flags) <= train_flags and "--connect_timeout" in flags
    assert job["completions"] == job["parallelism"] == int(values["HOSTS"])
    chips = 1
    for side in values["TOPOLOGY"].split("x"):
        chips *= int(side)
    assert int(values["HOSTS"]) * int(values["CHIPS_PER_HOST"]) == chips
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["containerName"] == container["name"] and tuple(rule["values"]) == local.FINAL
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 1
    assert misfits(found, JOBSET) == [".spec.replicatedJobs[0].template.spec: ['paralelism']"]


def test_the_jobsets_words_on_gpus():
    """The host name in the comment is the one JobSet gives: NAME-JOB-0-0.NAME, and its variables are what distributed reads."""
    from moe_jax.distributed import find

    found, values = jobset()
    text = (TEMPLATES / "gke_jobset.yaml").read_text()
    told = dict(re.findall(r"^#     - \{name: (\w+), value: \"(.*)\"\}$", text, re.M))
    told = {name: re.sub(r"\$\{(\w+)\}", lambda variable: values[variable[1]], value) for name, value in told.items()}
    world = find({**told, "JOB_COMPLETION_INDEX": "3"}, None, None, None)
    assert (world.index, world.count) == (3, int(values["HOSTS"]))
    assert world.coordinator == f"{values['NAME']}-{found['spec']['replicatedJobs'][0]['name']}-0-0.{values['NAME']}:8476"


@pytest.mark.parametrize(
    "code, restarts, queued_again",
    [(0, 0, False), (75, 9, True), (2, 0, False), (4, 0, False), (137, 0, True), (1, 2, True), (1, 3, False)],
)
def test_slurm(tmp_path, train_flags, code, restarts, queued_again):
    """srun is called with flags that launch.train has, and the job is queued again when that can help."""
    fake(tmp_path, "srun", f'printf "%s\\n" "$@" > {tmp_path}/srun.txt; exit {code}')
    fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')
    done = with_fakes(tmp_path, "slurm.sh", SLURM_JOB_ID="77", SLURM_RESTART_COUNT=str(restarts))
    arguments = (tmp_path / "srun.txt").read_text().splitlines()
    assert set(passed_flags(arguments)) <= train_flags
    assert "--ntasks-per-node=1" in arguments
    assert (tmp_path / "scontrol.txt").exists() == queued_again
    assert done.returncode == (0 if queued_again else code)
    if queued_again:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"


def test_tpu_vm(tmp_path, train_flags):
    fake(tmp_path, "gcloud", f'printf "%s\\n" "$@" > {tmp_path}/gcloud.txt; exit 75')
    assert with_fakes(tmp_path, "tpu_vm.sh", "train").returncode != 0, "it needs a name and a zone"
    assert with_fakes(tmp_path, "tpu_vm.sh", TPU="a", ZONE="b").returncode == 2
    assert with_fakes(tmp_path, "tpu_vm.sh", "train", TPU="a", ZONE="b").returncode == 75
    arguments = (tmp_path / "gcloud.txt").read_text().splitlines()
    assert "--worker=all" in arguments and "--zone=b" in arguments
    command = next(argument for argument in arguments if argument.startswith("--command="))
    assert set(passed_flags(command.split())) <= train_flags
    for what in ("install", "stop"):
        with_fakes(tmp_path, "tpu_vm.sh", what, TPU="a", ZONE="b", SOURCE="c")
        command = (tmp_path / "gcloud.txt").read_text().split("--command=")[1]
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
