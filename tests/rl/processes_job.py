"""A run of tests.rl.small in a job of several processes: `python -m launch.local --processes=2 -- python -m tests.rl.processes_job --folder=F`."""

from pathlib import Path

from absl import flags

from launch.common import Hosts, MeshFlag, run
from moe_jax.rl import loop

FOLDER = flags.DEFINE_string("folder", None, "Where the run writes.", required=True)
MESH, HOSTS = MeshFlag(), Hosts()


def main(argv: list[str]) -> None:
    HOSTS.start()
    from tests.rl.small import NOISY, TASK

    loop.run(NOISY, NOISY.program(MESH.build()), TASK, Path(FOLDER.value))


if __name__ == "__main__":
    run(main)
