"""Runs side by side: the bits that each has alone, one compilation, and nothing that happens to one reaches another."""

import dataclasses
import functools
import math
import signal
import warnings

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError, MoeJaxWarning, NonFinite, Stopped, Unsupported
from moe_jax.mesh import MeshSpec
from moe_jax.model import ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.train import lanes as module
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import DataConfig, build, load_corpus
from moe_jax.train.lanes import Lanes
from moe_jax.train.loop import RunConfig, run

BASE = RunConfig(
    model=ModelConfig.preset("tiny", num_layers=1, d_model=16, d_expert=16, dropout=0.1),
    data=DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=4, eval_windows=12),
    optimizer=OptimizerConfig(warmup=1, total=8),
    updates=8,
    eval_every=4,
    eval_batch=4,
    checkpoint_every=3,
)
# noise, balance and every seed differ; two lanes read the same text
CONFIGS = [
    dataclasses.replace(
        BASE,
        noise=f"router_logits=additive:{0.1 * i}:phases=train+eval",
        balance_weight=0.01 * i,
        init_seed=i,
        data_seed=i // 2,
        noise_seed=i + 5,
    )
    for i in range(4)
]


@functools.cache
def data_of(seed):
    return build(BASE.data, seed, corpus=corpus())


@functools.cache
def corpus():
    return load_corpus(BASE.data)


@functools.cache
def program():
    return CONFIGS[0].program()


def found(config, result, folder):
    """All that a run leaves: metrics, curves, usage, and the bits of its last state."""
    state, step = Checkpoints(folder / "checkpoints", config, data_of(config.data_seed).fingerprint).restore(program().init(np.uint32(0)))
    assert step == config.updates
    return result.metrics, result.series, result.load, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    results = [run(config, program(), data_of(config.data_seed), folder / str(i)) for i, config in enumerate(CONFIGS)]
    return [found(config, result, folder / str(i)) for i, (config, result) in enumerate(zip(CONFIGS, results, strict=True))]


def together(lanes, folder, which, stop=lambda lane: lambda: False, configs=CONFIGS):
    """The runs `which` in lanes: (what they left by number, the errors)."""
    results = {}

    def job(i, program):
        results[i] = run(configs[i], program, data_of(configs[i].data_seed), folder / str(i), stop=stop(i))

    errors = lanes.run([functools.partial(job, i) for i in which])
    return {i: found(configs[i], results[i], folder / str(i)) for i in results}, errors


@pytest.fixture(scope="module")
def lanes():
    return Lanes(CONFIGS[0].program(), 4)


def test_four_lanes_leave_the_bits_of_four_runs(alone, lanes, tmp_path):
    """Metrics, every value of every curve, usage and the last parameters; compiled once and not again; each lane on a device of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoeJaxWarning)  # a program that could not be copied would be compiled for each device
        left, errors = together(lanes, tmp_path, range(4))
    assert errors == [None] * 4
    assert left == dict(enumerate(alone))
    assert lanes.program.compiled == {"init": 1, "train": 1, "evaluate": 1}
    assert len({metrics["val_loss"] for metrics, *_ in alone}) == 4
    where = set()
    Lanes(lanes.program, 8).run([lambda program: where.update(program.init(np.uint32(0)).step.devices())] * 8)
    assert where == set(jax.devices())


@pytest.mark.slow
def test_more_lanes_than_devices(alone, monkeypatch, tmp_path):
    """Four lanes on three devices."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:3])
    shared = Lanes(CONFIGS[0].program(), 4)
    left, errors = together(shared, tmp_path, range(4))
    assert errors == [None] * 4 and left == dict(enumerate(alone)) and shared.program.compiled["train"] == 1


@pytest.mark.slow
def test_lanes_stopped_at_different_updates_go_on_in_other_lanes_or_none(alone, lanes, tmp_path):
    """Each stopped after another update; then two go on in lanes of other devices and two by themselves."""

    def after(lane):
        polls = iter(range(100))
        return lambda: next(polls) >= 2 * lane

    left, errors = together(lanes, tmp_path, range(4), stop=after)
    assert not left and all(isinstance(error, Stopped) for error in errors)
    assert [str(error).split()[3] for error in errors] == ["1", "3", "5", "7"]
    left, errors = together(lanes, tmp_path, [3, 0])
    assert errors == [None] * 2 and left == {i: alone[i] for i in (3, 0)}
    for i in (1, 2):
        assert (
            found(CONFIGS[i], run(CONFIGS[i], program(), data_of(CONFIGS[i].data_seed), tmp_path / str(i)), tmp_path / str(i)) == alone[i]
        )
    assert lanes.program.compiled["train"] == 1


def test_a_run_alone_goes_on_in_a_lane(alone, lanes, tmp_path):
    polls = iter(range(100))
    with pytest.raises(Stopped):
        run(CONFIGS[3], program(), data_of(1), tmp_path / "3", stop=lambda: next(polls) >= 4)
    left, errors = together(lanes, tmp_path, [2, 3])
    assert errors == [None] * 2 and left == {2: alone[2], 3: alone[3]}


@pytest.mark.slow
def test_what_one_lane_meets_the_others_do_not(alone, lanes, tmp_path):
    """A value that is not finite in lane 1, and a fault in lane 2."""

    class Poisoned(RunConfig):
        def knobs(self, update=0):
            knobs = super().knobs(update)
            return dataclasses.replace(knobs, noise=knobs.noise.scaled(math.nan))  # type: ignore[union-attr]

    values = {field.name: getattr(CONFIGS[1], field.name) for field in dataclasses.fields(RunConfig)}
    configs = [CONFIGS[0], Poisoned(**values), CONFIGS[2], CONFIGS[3]]

    def stop(lane):
        def fault():
            raise MemoryError("no room")

        return fault if lane == 2 else lambda: False

    left, errors = together(lanes, tmp_path, range(4), stop, configs)
    assert isinstance(errors[1], NonFinite) and "update 1 was refused" in str(errors[1])
    assert isinstance(errors[2], MemoryError) and errors[0] is errors[3] is None
    assert left == {0: alone[0], 3: alone[3]}


@pytest.mark.slow
def test_where_code_cannot_be_copied_it_is_compiled_for_each_device(alone, monkeypatch, tmp_path):
    def refused(*_):
        raise NotImplementedError("not on this backend")

    monkeypatch.setattr(module, "_onto", refused)
    with pytest.warns(
        MoeJaxWarning, match=r"(train|evaluate) is compiled again for \S+, onto which .* could not be copied: not on this backend"
    ):
        left, errors = together(Lanes(CONFIGS[0].program(), 2), tmp_path, range(2))
    assert errors == [None] * 2 and left == dict(enumerate(alone[:2]))


def test_a_second_signal_ends_every_lane(lanes):
    """An exception in the thread that waits: all lanes stop at their next update, and it is raised."""
    long = [dataclasses.replace(config, updates=100_000, checkpoint_every=0, eval_every=0) for config in CONFIGS[:2]]
    seen, told = [], []

    def job(config, program):
        try:
            run(config, program, data_of(0), progress=Told())  # type: ignore[arg-type]
        except Stopped as error:
            seen.append(str(error))
            raise

    class Told:
        def update(self, step, *_):
            if step >= 3 and not told:
                told.append(step)
                signal.raise_signal(signal.SIGUSR2)

    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            lanes.run([functools.partial(job, config) for config in long])
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(seen) == 2 and all("goes on from the last checkpoint" in text for text in seen)  # none runs on behind the caller's back


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count):
    with pytest.raises(ConfigError, match=f"number of lanes must be at least 1, got {count}"):
        Lanes(program(), count)


def test_what_lanes_do_not_combine_with_is_refused(lanes, monkeypatch):
    with pytest.raises(ConfigError, match="5 runs at a time need as many lanes; there are 4"):
        lanes.run([print] * 5)
    with pytest.raises(Unsupported, match="2 lanes of a model on a mesh: lanes do not combine with other mesh axes yet"):
        Lanes(BASE.program(MeshSpec(data=8).build()), 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(Unsupported, match="4 lanes in a job of 2 processes"):
        Lanes(program(), 4)
