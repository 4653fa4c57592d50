"""What a plan compiles of reinforcement learning: the programs that the loop calls, with the shapes that it gives them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.mesh import MeshSpec
from moe_jax.plan.steps import compile_step, lower, shapes_of
from moe_jax.rl.loop import run
from moe_jax.rl.planned import PolicyRun
from moe_jax.train.run_config import RunConfig
from tests.rl.small import CONFIG, TASK, program_of

# the shapes that the tests of the loop compile; an evaluation asks fewer problems than a step has answers, and is filled up to as many
SMALL = replace(CONFIG, steps=1, eval_problems=9, checkpoint_every=0)
MESH = MeshSpec.parse("data=2,expert=2")


def test_the_shapes_are_those_of_a_run(monkeypatch):
    """Every argument of each program, with its type, when the loop first calls it."""
    program, called = program_of(SMALL), {}
    config = PolicyRun.of(SMALL)

    def noting(name, compiled):
        def noted(*args):
            called.setdefault(name, of(args))
            return compiled(*args)

        return noted

    for name in config.shapes.steps:
        monkeypatch.setattr(program, name, noting(name, getattr(program, name)))
    run(SMALL, program, TASK)
    assert called.keys() == {"train", "score", "sample"}
    one = MeshSpec.parse("data=1").build(jax.devices()[:1])
    for name, wanted in called.items():
        assert of(lower(name, config, one).args_info[0]) == wanted, name


def of(args) -> list[tuple]:
    """Shapes and types of the arrays, in order."""
    return [
        (np.shape(leaf), np.result_type(leaf)) if not hasattr(leaf, "shape") else (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args)
    ]


def test_what_lies_beside():
    """While answers are sampled the optimizer's moments are there, and the reference policy where there is one."""
    config, mesh = PolicyRun.of(SMALL), MESH.build(jax.devices()[:4])
    found = compile_step("score", config, mesh, "cpu")
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(config.program().model.abstract()))
    assert params / 2 < found.beside < 2.1 * params  # two moments, a part of them divided over two experts
    shapes = shapes_of(config)(config, mesh)
    assert shapes.beside("train") == 0 and shapes.beside("sample") == found.beside
    kept = PolicyRun.of(replace(SMALL, replay="reference", start="a checkpoint"))
    assert params / 2 < kept.shapes(kept, mesh).beside("train") < params
    assert found.peak > found.beside


def test_the_batch_that_is_planned_is_scored():
    """Given another one than the run has, both programs and the words take it; its sequences are as long as prompts and answers."""
    config = PolicyRun.of(SMALL)
    assert (config.data.batch_size, config.data.seq_len) == (SMALL.rows, SMALL.length)
    other = replace(config, data=config.data.replace(batch_size=32))
    assert other.eval_batch == 32 and "scoring: 32 answers" in other.shapes.batches(other)
    one = MeshSpec.parse("data=1").build(jax.devices()[:1])
    assert ((32, 12), np.dtype(np.int32)) in of(lower("score", other, one).args_info[0])
    with pytest.raises(
        ConfigError, match=r"data.seq_len=8: a sequence of this run is a prompt and its answer, 6 \+ 6 tokens; leave --seq out"
    ):
        replace(config, data=config.data.replace(seq_len=8))


def test_its_steps_are_its_own():
    assert shapes_of(PolicyRun.of(SMALL)).steps == ("train", "score", "sample")
    assert "prefill" in shapes_of(RunConfig()).steps
    with pytest.raises(ConfigError, match="unknown step 'prefill'; known: train, score, sample"):
        lower("prefill", PolicyRun.of(SMALL), MESH.build(jax.devices()[:4]))
