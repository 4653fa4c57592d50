"""From the flags of launch.plan to its plan."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from moe_jax import config_tools
from moe_jax.errors import ConfigError
from moe_jax.mesh import MeshSpec
from moe_jax.model import ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.plan import report
from moe_jax.plan.chips import CHIPS
from moe_jax.plan.costs import USUAL, best, fitted, preset_run
from moe_jax.plan.plan import candidates, make_plan
from moe_jax.plan.topology import Topology, topology
from moe_jax.rl.config import RLConfig
from moe_jax.rl.planned import PolicyRun
from moe_jax.studies.document import Heading, Table, to_html, to_text
from moe_jax.train.run_config import RunConfig
from moe_jax.train.sources import cache_root
from moe_jax.train.step import Objective


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags that say what is planned."""

    topology: str
    preset: str | None
    experiment: str | None
    mesh: str
    batch: int | None
    seq: int | None
    remat: str | None
    noise: str
    updates: int | None

    def given_mesh(self) -> MeshSpec | None:
        return MeshSpec.parse(self.mesh) if self.mesh else None


def make(request: Request, override: Callable[[RunConfig], RunConfig]) -> tuple[RunConfig, Topology, int]:
    """The run to plan, the devices, and how many such runs there are."""
    request.given_mesh()  # a wrong one is refused first
    if request.preset:
        model = ModelConfig.preset(request.preset)
        if request.seq and request.seq > model.max_seq_len:
            raise ConfigError(f"--seq={request.seq} is longer than the {model.max_seq_len} positions of {request.preset}")
    devices = topology(request.topology)
    config, runs = (preset_run(request.preset, devices.size, request.seq, request.batch), 1) if request.preset else _of_study(request)
    data = config.data.replace(**{name: value for name, value in (("seq_len", request.seq), ("batch_size", request.batch)) if value})
    model = config.model.replace(**({"remat": request.remat} if request.remat else {}))
    config = dataclasses.replace(
        config, data=data, model=model, noise=request.noise or config.noise, updates=request.updates or config.updates
    )
    config = override(config)
    config.model.resolve(NoiseSpec.parse(config.noise))
    return (config if request.batch or request.mesh else fitted(config, devices.size)), devices, runs


def _of_study(request: Request) -> tuple[RunConfig, int]:
    """The run of a study with noise at the most sites, and how many runs it has."""
    from experiments.catalogue import load

    configs = [PolicyRun.of(config) if isinstance(config, RLConfig) else config for config in load(str(request.experiment)).configs()]
    return max(configs, key=lambda config: len(NoiseSpec.parse(config.noise).by_site())), len(configs)


def describe(config: RunConfig, devices: Topology, request: Request) -> str:
    """What the models say, nothing compiled."""
    _, explanation, _ = candidates(config, devices, request.given_mesh(), bool(request.remat))
    return f"{json.dumps(config_tools.config_dict(config), indent=2)}\n{explanation}"


def write(
    config: RunConfig, devices: Topology, request: Request, runs: int, steps: tuple[str, ...], folder: Path | None, argv: list[str]
) -> int:
    """Compiles, prints and writes; 0 when it fits."""
    say = functools.partial(print, file=sys.stderr, flush=True)
    plan = make_plan(config, devices, request.given_mesh(), steps, bool(request.remat), say, cache_root() / "plans")
    others = () if plan.fits else would_fit(config, request.topology, bool(request.remat))
    found = report.blocks(plan, runs, others, command(plan, request))
    text = "\n\n".join(_plain(block) for block in found)
    title = f"Plan: {request.preset or request.experiment} on {request.topology}"
    print(f"{title}\n\n{text}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "jax": jax.__version__,
            "argv": argv[1:],
            "mesh": dataclasses.asdict(plan.mesh),
            "fits": plan.fits,
            "config": config_tools.config_dict(plan.config),
        }
        facts |= {"clean": report.summary(plan.clean), "noisy": report.summary(plan.noisy), "memory_model": dataclasses.asdict(plan.memory)}
        (folder / "plan.json").write_text(json.dumps(facts, indent=1) + "\n")
        (folder / "plan.txt").write_text(f"{title}\n\n{text}\n")
        (folder / "plan.html").write_text(to_html(title, found))
        print(f"\nplan: {folder / 'plan.html'}")
    return 0 if plan.fits else 1


def _plain(block) -> str:
    if isinstance(block, Table):
        return to_text(block)
    if isinstance(block, Heading):
        return f"== {block.text} =="
    return "\n".join(f"- {item}" for item in block.items) if hasattr(block, "items") else block.text


def would_fit(config: RunConfig, name: str, keep_remat: bool) -> tuple[str, ...]:
    """Other slices that the memory model finds large enough, in words."""
    found = []
    for other in (*USUAL, "v5e:16x16", "v6e:16x16"):
        candidate = best(config, other, keep_remat) if other != name else None
        if candidate is not None and candidate.memory is not None:
            limit = CHIPS[other.split(":")[0]].limit
            found.append(
                f"{other} with {candidate.mesh}, remat {candidate.config.model.remat}: {candidate.memory.peak / 2**30:.1f} of {limit / 2**30:.0f} GiB"
            )
    return tuple(found)


def command(plan, request: Request) -> str:
    """The launch.train that runs the planned step of a preset; of a study its launch.study, and what the plan has otherwise than its runs."""
    mesh = f" --mesh={plan.mesh}" if plan.mesh.size > 1 else ""
    if not request.preset:
        own = dataclasses.replace(_of_study(request)[0], noise="")
        changed = config_tools.differences(own, plan.config)
        otherwise = f", but for what the study sets otherwise: {'; '.join(changed)}" if changed else ""
        return f"python -m launch.study --experiment={request.experiment}{mesh} --workdir=…{otherwise}"
    changed = {}
    for prefix, now, usual in (
        ("model", plan.config.model, ModelConfig.preset(request.preset)),
        ("optimizer", plan.config.optimizer, OptimizerConfig(warmup=plan.config.updates // 20, total=plan.config.updates)),
        ("objective", plan.config.objective, Objective()),
    ):
        before, after = config_tools.flatten(usual), config_tools.flatten(now)
        changed |= {f"{prefix}.{name}": value for name, value in after.items() if value != before[name]}
    data = plan.config.data
    changed |= {
        "data.seq_len": data.seq_len,
        "data.batch_size": data.batch_size,
        "data.accumulation": data.accumulation,
        "eval_batch": plan.config.eval_batch,
    }
    sets = " ".join(f"--set {name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in changed.items())
    noise = f" --noise={plan.noise}" if plan.noise else ""
    return f"python -m launch.train --preset={request.preset}{mesh} --steps={plan.config.updates}{noise} {sets} --workdir=…"
