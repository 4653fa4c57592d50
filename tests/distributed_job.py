"""A small job for the tests of several processes: sums over all devices step by step, saves after each step, resumes.

    python -m tests.distributed_job --folder=F --steps=20 --sleep=0.1 [--fail=DataError] [--fail=2:DataError] [--coordinator=…]

Its total after n steps is known beforehand, so that a job which was killed and came back can be checked.
"""

import json
import os
import sys
import time
from pathlib import Path

from absl import flags

from launch.common import Hosts, StopRequests, run
from moe_jax import distributed, errors

FOLDER = flags.DEFINE_string("folder", None, "Where the job saves, and every process notes its pid.", required=True)
STEPS = flags.DEFINE_integer("steps", 3, "Steps.")
SLEEP = flags.DEFINE_float("sleep", 0.0, "Seconds between steps.")
FAIL = flags.DEFINE_string("fail", "", "The error that process 0 meets in step 2, or 'INDEX:ERROR' for a process that fails by itself.")
HOSTS = Hosts()


def fail(step: int, index: int) -> None:
    """Raises the error of --fail, through on_first when it is to reach everybody."""
    where, _, name = FAIL.value.rpartition(":")
    if name and step == 2 and where in ("", str(index)):
        error = getattr(errors, name, RuntimeError)(f"as asked in step {step}")
        if where:
            raise error

        def work() -> None:
            raise error

        distributed.on_first(work)


def main(argv: list[str]) -> None:
    found = HOSTS.start()
    import jax
    import jax.numpy as jnp
    import numpy as np

    folder = Path(FOLDER.value)
    (folder / f"pid{found.index}").write_text(str(os.getpid()))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    add = jax.jit(lambda total, x: total + x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    saved = folder / "saved.json"
    state = distributed.on_first(lambda: json.loads(saved.read_text()) if saved.exists() else {"step": 0, "total": 0.0})
    total = jnp.float32(state["total"])
    with StopRequests() as stop:
        for step in range(state["step"], STEPS.value):
            x = jax.make_array_from_callback((found.devices,), rows, lambda at, s=step: np.float32([at[0].start or 0]) + s)
            total = add(np.float32(total), x)
            value = float(total)
            fail(step, found.index)

            def save(step=step, value=value) -> bool:
                saved.with_suffix(".new").write_text(json.dumps({"step": step + 1, "total": value}))
                saved.with_suffix(".new").replace(saved)
                print(f"step {step + 1}: {value:g}", flush=True)
                return bool(stop())

            if distributed.on_first(save):
                raise errors.Stopped(f"{stop() or 'a signal'}: the same command goes on")
            time.sleep(SLEEP.value)
    distributed.on_all(lambda: None)
    print(f"total {float(total):g}", file=sys.stdout if distributed.first() else sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, resumable=True)
