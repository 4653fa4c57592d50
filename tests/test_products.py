"""The one matmul: values and gradients against NumPy in every layout and number type, and what it asks of an operator and when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.platforms import tracing_for
from moe_jax.products import matmul, outer_by_group, partial_sums, product, product_by_group, sum_count, weight_gradient

RANDOM = np.random.default_rng(0)
SIZES = np.array([2, 0, 3, 1])  # rows of each group; the second has none
GROUP = np.repeat(np.arange(4), SIZES)
# layout: (shape of x, shape of w, options)
LAYOUTS = {
    "dense": ((6, 5), (5, 7), {}),
    "leading": ((2, 3, 5), (5, 7), {}),
    "transposed": ((2, 3, 5), (7, 5), dict(transposed=True)),
    "grouped": ((6, 5), (4, 5, 7), dict(sizes=jnp.asarray(SIZES))),
}


def case(layout, dtype="float32"):
    """(x, w, dy, options) of whole numbers, which float32 multiplies and adds exactly."""
    x_shape, w_shape, options = LAYOUTS[layout]
    whole = lambda *shape: jnp.asarray(RANDOM.integers(-8, 9, shape), dtype)  # noqa: E731
    return whole(*x_shape), whole(*w_shape), whole(*x_shape[:-1], 7), options


def reference(layout, x, w, dy):
    """(y, dx, dw) in float64, row by row."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    w_of = np.swapaxes(w, -1, -2) if layout == "transposed" else w
    y, dx, dw = np.zeros(dy.shape), np.zeros_like(x), np.zeros_like(w_of)
    for flat, row in enumerate(np.ndindex(x.shape[:-1])):
        place = GROUP[flat] if layout == "grouped" else ...
        y[row], dx[row] = x[row] @ w_of[place], dy[row] @ w_of[place].T
        dw[place] += np.outer(x[row], dy[row])
    return y, dx, np.swapaxes(dw, -1, -2) if layout == "transposed" else dw


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients(layout, dtype):
    """Whole numbers: equal to the last bit, whatever the order of the sums. The result is float32, gradients have the types of x and w."""
    x, w, dy, options = case(layout, dtype)
    wide = w.astype("float32")

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, **options), x, w)
        return y, *pull(dy)

    y, dx, dw = run(x, wide, dy.astype("float32"))
    assert (y.dtype, dx.dtype, dw.dtype) == ("float32", dtype, "float32")
    expected_y, expected_dx, expected_dw = reference(layout, x, w, dy)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(dx, jnp.asarray(expected_dx, "float32").astype(dtype))
    np.testing.assert_array_equal(dw, expected_dw)


def test_a_weight_wider_than_the_rows_is_rounded_to_their_type():
    x, _, _, _ = case("dense", "bfloat16")
    w = jnp.asarray(RANDOM.normal(size=(5, 7)), "float32")
    np.testing.assert_array_equal(matmul(x, w), matmul(x, w.astype("bfloat16").astype("float32")))
    assert abs(matmul(x, w) - matmul(x.astype("float32"), w)).max() > 1e-4


@dataclasses.dataclass
class Recorder:
    """An operator that computes exactly and notes what it was asked, and adds 1000 times its second sum to dW."""

    asked: list
    sum_count: int = 2

    def product(self, pass_, rows, a, b, multiply, axis, part=(0, 0)):
        assert part == (0, 0)  # these are whole rows of the result
        y = multiply(a, b)
        self.asked.append((pass_, None if rows is None else np.shape(rows), a.shape, b.shape, axis, y.dtype))
        return y

    def partial_sums(self, a, b, multiply):
        return multiply(a, b), multiply(a * a, b * b)

    def weight_gradient(self, sums, first):
        self.asked.append(("grad_weight", len(sums), sums[0].shape, int(first)))
        return sums[0] + 1000 * sums[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_an_operator_is_asked(layout):
    """Forward with the axis of w that it contracts, dX with the same one, dW once with its sums and the place of its first row."""
    x, w, dy, options = case(layout)
    recorder = Recorder([])

    class Held:
        """A pytree without leaves around the recorder."""

        def __getattr__(self, name):
            return getattr(recorder, name)

    jax.tree_util.register_pytree_node(Held, lambda held: ((), None), lambda _, __: Held())
    rows = jnp.arange(6).reshape(x.shape[:-1])
    y, pull = jax.vjp(lambda x, w: matmul(x, w, Held(), rows, first=35, **options), x, w)
    dx, dw = pull(dy.astype("float32"))
    axis = -1 if layout == "transposed" else -2
    expected_y, expected_dx, expected_dw = reference(layout, x, w, dy)
    squares = reference(layout, np.square(x), w, np.square(dy))[2]
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(dx, expected_dx)
    np.testing.assert_array_equal(dw, expected_dw + 1000 * squares)
    assert recorder.asked == [
        ("forward", rows.shape, x.shape, w.shape, axis, "float32"),
        ("grad_input", rows.shape, dy.shape, w.shape, axis, "float32"),
        ("grad_weight", 2, w.shape, 35),
    ]


def test_without_an_operator_everything_is_exact():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 4))
    np.testing.assert_array_equal(product(None, "forward", None, a, b, jnp.dot), a @ b)
    sums = partial_sums(None, a, b, jnp.dot)
    assert len(sums) == sum_count(None) == 1 and weight_gradient(None, sums, b) is sums[0]


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (300, (200, 0, 99, 1)),
        (300, (64, 64, 128, 44)),
        (300, (0, 0, 0, 300)),
        (300, (65, 63, 1, 0)),
        (300, (0, 300)),
        (7, (7,)),
        (7, (3, 2, 1, 0, 1)),
        (7, (0, 0)),
    ],
)
def test_product_by_group_multiplies_each_row_by_its_groups_matrix(count, sizes):
    """Exactly, in tiles that end inside, at and beyond a group's end; the rows after the last group's may hold anything and come out as anything."""
    total = sum(sizes)
    a = np.full((count, 5), np.nan, np.float32)
    a[:total], w = RANDOM.integers(-8, 9, (total, 5)), RANDOM.integers(-8, 9, (len(sizes), 5, 7)).astype(np.float32)
    found = jax.jit(product_by_group)(jnp.asarray(a), jnp.asarray(w), jnp.array(sizes))
    assert found.shape == (count, 7) and found.dtype == jnp.float32
    want = np.einsum("rm,rmn->rn", a[:total], w[np.repeat(np.arange(len(sizes)), sizes)])
    np.testing.assert_array_equal(found[:total], want)


def test_a_gpu_takes_the_tiles_and_others_ragged_dot():
    x, w, dy, options = case("grouped")
    want = jax.vjp(lambda x, w: matmul(x, w, **options), x, w)

    def program():
        return str(jax.make_jaxpr(lambda x, w: jax.vjp(lambda x, w: matmul(x, w, **options), x, w)[1](dy))(x, w))

    assert program().count("ragged_dot") > 0
    with tracing_for("gpu"):
        assert "ragged_dot" not in program()
        got = jax.vjp(lambda x, w: matmul(x, w, **options), x, w)
        for ours, theirs in zip((got[0], *got[1](dy)), (want[0], *want[1](dy)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [(2, 0, 3, 1), (0, 0, 0, 0), (9, 0, 0, 2), (0, 4, 0, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("tile", [1, 3, 4, 11, 64])
def test_outer_by_group_sums_each_groups_rows_and_no_others(sizes, tile):
    """Rows of no group hold no numbers, and tiles that reach over the end count nothing twice."""
    total = sum(sizes)
    a, b = (np.full((11, width), np.nan, np.float32) for width in (5, 7))
    a[:total], b[:total] = RANDOM.integers(-8, 9, (total, 5)), RANDOM.integers(-8, 9, (total, 7))
    found = jax.jit(outer_by_group, static_argnames="tile")(jnp.asarray(a), jnp.asarray(b), jnp.array(sizes), tile=tile)
    ends = np.cumsum(sizes)
    np.testing.assert_array_equal(found, [a[end - size : end].T @ b[end - size : end] for end, size in zip(ends, sizes, strict=True)])
