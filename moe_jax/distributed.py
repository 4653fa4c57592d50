"""One job of several processes: `initialize()` finds out which process this is, meets the others and refuses what does not fit.

Process 0 is the only one that talks and writes what is written once. What it decides or fails at reaches the others through jax's
coordination service, which needs no devices. `share`, `on_first` and `on_all` are collective: every process calls them, in one order.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moe_jax import errors
from moe_jax.errors import ConfigError

LOCAL = ("MOE_JAX_COORDINATOR", "MOE_JAX_NUM_PROCESSES", "MOE_JAX_PROCESS_ID")  # what launch.local tells its processes
HEARTBEAT = 30  # seconds of silence after which jax ends the processes that are left
PATIENCE = 1_800_000  # milliseconds that processes wait for another one's file work; a dead one is noticed by its heartbeat
_Value = TypeVar("_Value")
_uses = itertools.count()  # of on_first and on_all: every process counts alike


@dataclasses.dataclass(frozen=True)
class Found:
    """What was announced, and the numbers of this process's devices and of all; count 0: jax is to ask a TPU VM's metadata server."""

    index: int
    count: int
    source: str  # "alone", "flags", "launch.local", "SLURM job 123", "JAX_NUM_PROCESSES", "TPU_WORKER_HOSTNAMES" or "TPU VM"
    coordinator: str = ""  # host:port of process 0
    local_devices: int = 0
    devices: int = 0

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} ({self.source}), {self.local_devices} of {self.devices} devices"


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout=20.0) -> Found:
    """Joins the job that the arguments, launch.local, SLURM, Kubernetes or a TPU pod announce; to be called before asking for devices.

    Within about `timeout` seconds all processes have met at `coordinator` (host:port of process 0), or each raises ConfigError.
    """
    import jax

    world = find(os.environ, coordinator, num_processes, process_id)
    if world.count > 1:
        (_join if world.index else _gather)(world, timeout)
    if world.count != 1:
        _connect(world)
    if world.count not in (0, jax.process_count()):
        raise ConfigError(f"{world.source} means {world.count} processes, but jax sees {jax.process_count()}")
    counts = {"local_devices": jax.local_device_count(), "devices": jax.device_count()}
    return dataclasses.replace(world, index=jax.process_index(), count=jax.process_count(), **counts)


def find(environ: Mapping[str, str], coordinator: str | None, num_processes: int | None, process_id: int | None) -> Found:
    """What the flags say, completed by what the environment announces. ConfigError when they differ or something is missing."""
    world = _local(environ) or _slurm(environ) or _variables(environ) or _tpu(environ) or Found(0, 1, "alone")
    if not world.count and num_processes == 1:
        world = Found(0, 1, "alone")
    if world.source not in ("alone", "TPU VM") and num_processes not in (None, world.count):
        raise ConfigError(f"--num_processes={num_processes}, but {world.source} announces {world.count} processes")
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    if set(given.values()) != {None} and not (num_processes == 1 and coordinator is None):
        told = (world.coordinator, world.count, world.index) if world.count > 1 else (None, None, None)
        lead, count, index = (known if own is None else own for own, known in zip(given.values(), told, strict=True))
        if lead is None or count is None or index is None:
            missing = " and ".join(name for name, value in given.items() if value is None)
            raise ConfigError(f"{missing} missing: several processes need --coordinator, --num_processes and --process_id")
        world = Found(int(index), int(count), "flags", str(lead))
    if world.source != "TPU VM" and not 0 <= world.index < world.count:
        raise ConfigError(f"process {world.index} of {world.count} ({world.source}): process ids go from 0 to the number of processes - 1")
    host, _, port = world.coordinator.rpartition(":")
    if world.count > 1 and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"the coordinator's address '{world.coordinator}' ({world.source}) must be host:port")
    return world


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: 'rack[2-3]n[01-04,07],x' gives 'rack2n01'."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.findall(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0])


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is '{text}' where a whole number is needed")
    return int(text)


def _local(environ: Mapping[str, str]) -> Found | None:
    if not any(environ.get(name) for name in LOCAL):
        return None
    return Found(_number(environ, LOCAL[2]), _number(environ, LOCAL[1]), "launch.local", environ.get(LOCAL[0], ""))


def _slurm(environ: Mapping[str, str]) -> Found | None:
    """A task of srun. The port follows from the job and step, above the range that systems hand out by themselves."""
    if "SLURM_JOB_ID" not in environ or environ.get("SLURM_NTASKS", "1") == "1":
        return None
    job, count = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_NTASKS")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if "SLURM_PROCID" not in environ or not nodes:
        text = f"SLURM job {job} announces {count} tasks, but this is none of them (no SLURM_PROCID or SLURM_STEP_NODELIST)"
        raise ConfigError(f"{text}: start with srun, or with srun --ntasks=1 for a single process")
    address = f"{first_host(nodes)}:{61440 + (job + _number(environ, 'SLURM_STEP_ID', '0')) % 4096}"
    return Found(_number(environ, "SLURM_PROCID"), count, f"SLURM job {job}", environ.get("JAX_COORDINATOR_ADDRESS", address))


def _variables(environ: Mapping[str, str]) -> Found | None:
    """What our GKE template and Kubeflow set; Kubernetes by itself only numbers the pods of an indexed job."""
    pod = environ.get("JOB_COMPLETION_INDEX", "0")
    if "JAX_NUM_PROCESSES" in environ:
        index, count = _number(environ, "JAX_PROCESS_ID", pod), _number(environ, "JAX_NUM_PROCESSES")
        return Found(index, count, "JAX_NUM_PROCESSES", environ.get("JAX_COORDINATOR_ADDRESS", ""))
    if pod != "0" and "TPU_WORKER_HOSTNAMES" not in environ:
        raise ConfigError(f"this is pod {pod} of an indexed job, and JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not set")
    return None


def _tpu(environ: Mapping[str, str]) -> Found | None:
    """GKE names the workers of a slice and, of several slices, the first; on a TPU VM jax asks the metadata server."""
    if "TPU_WORKER_HOSTNAMES" in environ:
        hosts, slices = environ["TPU_WORKER_HOSTNAMES"].split(","), _number(environ, "MEGASCALE_NUM_SLICES", "1")
        lead = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "" if slices > 1 else hosts[0]).split(":")[0]
        index = len(hosts) * _number(environ, "MEGASCALE_SLICE_ID", "0") + _number(environ, "TPU_WORKER_ID", "0")
        return Found(index, len(hosts) * slices, "TPU_WORKER_HOSTNAMES", lead and f"{lead}:8482")
    wanted = "tpu" in environ.get("JAX_PLATFORMS", "tpu") and "TPU_SKIP_MDS_QUERY" not in environ and importlib.util.find_spec("libtpu")
    chips = wanted and [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return Found(0, 0, "TPU VM") if chips else None


def _gather(world: Found, timeout: float) -> None:
    """Process 0: waits for the others, tells each whether the job is complete, and leaves the port to jax.

    jax's own meeting ends the process with a C++ stack dump when somebody does not come.
    """
    deadline, problem, both = time.monotonic() + timeout, "", socket.has_dualstack_ipv6()
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as peers:
        try:
            family, port = socket.AF_INET6 if both else socket.AF_INET, int(world.coordinator.rsplit(":", 1)[1])
            server = peers.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024))
        except OSError as error:
            raise ConfigError(f"process 0 cannot listen at {world.coordinator} ({error}): choose another port") from None
        while len(came) < world.count - 1 and not problem and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # nobody came yet, or a stranger
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                peer = peers.enter_context(server.accept()[0])
                peer.settimeout(2)
                index, count = (int(word) for word in peer.makefile().readline().removeprefix("moe_jax ").split())
                if count != world.count or index in (0, *came):
                    text = f"process {index} of {count} came to process 0 of {world.count}{' a second time' * (index in came)}"
                    problem = f"{text}: all need the same number of processes, and each its own --process_id"
                came[-1 if problem else index] = peer
        missing = [str(index) for index in range(1, world.count) if index not in came]
        if missing and not problem:
            text = f"{len(came) + 1} of {world.count} processes came to {world.coordinator} within {timeout:g} s"
            problem = f"{text}, without process {', '.join(missing[:8])}{', …' * (len(missing) > 8)}"
        server.close()
        for peer in came.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"moe_jax {problem or 'complete'}\n".encode())
    if problem:
        raise ConfigError(problem)


def _join(world: Found, timeout: float) -> None:
    """The others: find process 0, say who they are, wait for its verdict and then for jax's service, which takes the port."""
    verdict = ""
    with _dial(world, timeout) as peer, peer.makefile() as lines, contextlib.suppress(OSError, ValueError):
        peer.settimeout(timeout + 3)
        peer.sendall(f"moe_jax {world.index} {world.count}\n".encode())
        verdict = lines.readline().strip().partition("moe_jax ")[2]
    if verdict != "complete":
        raise ConfigError(verdict or f"process {world.index}: what answered at {world.coordinator} ended, or is not this job's process 0")
    _dial(world, timeout).close()


def _dial(world: Found, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    host, port = world.coordinator.rsplit(":", 1)
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), max(0.1, min(5.0, deadline - time.monotonic())))
        except OSError as error:
            if time.monotonic() > deadline:
                text = f"process {world.index} of {world.count}: nothing answers at {world.coordinator} within {timeout:g} s ({error})"
                raise ConfigError(f"{text}: start process 0 there, or correct the address") from None
        time.sleep(0.1)


def _connect(world: Found) -> None:
    """Starts jax's own service, and raises everywhere when the processes do not see one and the same job."""
    import jax

    told: dict[str, Any] = {"num_processes": world.count, "process_id": world.index, "cluster_detection_method": "deactivate"}
    told = {"coordinator_address": world.coordinator, **told} if world.count else {}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the command, which saves and stops
    try:
        jax.distributed.initialize(**told, initialization_timeout=60, heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        raise ConfigError(f"{world.source}: jax found no pod ({error}): --num_processes=1 runs on this host alone") from None
    sees = [jax.process_count(), jax.device_count(), jax.default_backend(), jax.__version__]
    first_sees, count = share(sees), _job()[2]

    def compare() -> None:
        if sees != [count, *first_sees[1:]]:
            raise ConfigError(f"of {count} processes, this one sees (processes, devices, platform, jax) {sees}, process 0 {first_sees}")

    on_all(compare)


def _job() -> tuple[Any, int, int]:
    """(the coordination service's client, this process, how many), without asking for devices."""
    from jax._src.distributed import global_state as state

    return state.client, state.process_id, state.num_processes


def first() -> bool:
    """Whether this is process 0, or alone."""
    return not _job()[1]


def share(value: Any) -> Any:
    """Process 0's JSON-able value in every process."""
    return on_first(lambda: value)


def on_first(function: Callable[[], Any]) -> Any:
    """What function() returned in process 0, or its error, in every process; tuples become lists unless alone."""
    client, index, count = _job()
    if count == 1:
        return function()
    key = f"moe_jax/told/{next(_uses)}"
    if index:
        kind, said = json.loads(client.blocking_key_value_get(key, PATIENCE))
        if kind:
            raise getattr(errors, kind)(said)
        return said
    try:
        said = json.dumps(["", function()])
    except Exception as error:
        told = [_kind(error), str(error)] if _kind(error) else ["MoeJaxError", f"process 0 failed: {type(error).__name__}: {error}"]
        client.key_value_set(key, json.dumps(told))
        raise
    client.key_value_set(key, said)
    return json.loads(said)[1]


def on_all(function: Callable[[], _Value]) -> _Value:
    """What function() returns in this process, once it has returned in every one.

    When it failed anywhere, all raise the first failure, as its kind of MoeJaxError with the number of the process: none goes on alone, or waits.
    """
    client, index, count = _job()
    if count == 1:
        return function()
    value, failure, key = None, None, f"moe_jax/told/{next(_uses)}/"
    try:
        value = function()
    except Exception as error:
        failure = [_kind(error) or "MoeJaxError", str(error).strip() or type(error).__name__]
    client.key_value_set(f"{key}{index}", json.dumps(failure))

    def verdict() -> None:
        failures = [json.loads(client.blocking_key_value_get(f"{key}{other}", PATIENCE)) for other in range(count)]
        client.key_value_delete("moe_jax/told/")  # everybody is here, past what was told before
        for other, failed in enumerate(failures):
            if failed:
                raise getattr(errors, failed[0])(f"process {other}: {failed[1]}" if other else failed[1])

    on_first(verdict)
    return value  # type: ignore[return-value]


def _kind(error: Exception) -> str:
    """Which of this library's errors it is, or "": what another process raises in its turn."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__), "")
