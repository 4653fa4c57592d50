"""What every dispatch must compute, as a NumPy loop over tokens and slots in float64, with an operator's errors where the contract puts them."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gelu_tanh(z):
    return np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))


# name: (value, derivative)
ACTIVATIONS = {
    "silu": (lambda z: z * sigmoid(z), lambda z: sigmoid(z) * (1 + z * (1 - sigmoid(z)))),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
    "gelu": (
        lambda z: 0.5 * z * (1 + gelu_tanh(z)),
        lambda z: 0.5 * (1 + gelu_tanh(z)) + 0.5 * z * (1 - gelu_tanh(z) ** 2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2),
    ),
}


def bump(np_like, site, pass_, rows, width):
    """A perturbation by logical coordinates, in numpy or jax.numpy: it depends on nothing but site, pass, row and column."""
    phase = zlib.crc32(f"{site}/{pass_}".encode()) % 97
    return np_like.sin(0.37 * rows[:, None] + 1.3 * np_like.arange(width) + phase)


def keep(np_like, rows, width):
    """A dropout mask by logical coordinates: 0 at one in five, 1.25 elsewhere."""
    return np_like.where((7 * rows[:, None] + 3 * np_like.arange(width)) % 5 == 0, 0.0, 1.25)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("scale",), meta_fields=("name",))
@dataclasses.dataclass(frozen=True)
class Bumpy:
    """An operator (moe_jax.products) that adds bumps to all three products, to dW in proportion to its sum of squared products plus one."""

    scale: jax.Array
    name: str
    sum_count = 2

    def product(self, pass_, rows, a, b, multiply, axis, part=(0, 0)):
        assert (axis, part) == (-2, (0, 0)), "the forward pass contracts an expert's first axis, and rows are whole"
        y = multiply(a, b)
        return y + self.scale * bump(jnp, self.name, pass_, rows, y.shape[-1])

    def partial_sums(self, a, b, multiply):
        return multiply(a, b), multiply(jnp.square(a), jnp.square(b))

    def weight_gradient(self, sums, first):
        dw, squares = sums
        rows = first + jnp.arange(dw.size // dw.shape[-1])
        return dw + self.scale * bump(jnp, self.name, "grad_weight", rows, dw.shape[-1]).reshape(dw.shape) * (1 + squares)


def bumpy(names, scale=0.3):
    return {name: Bumpy(jnp.float32(scale), name) for name in names}


def keep_mask(context, rows, width):
    del context
    return keep(jnp, rows, width)


def moe(x, ids, weights, matrices, dy, activation="silu", scale=0.0, masked=False, tokens=None, bumped=("up", "gate", "down")):
    """(y, dx, d_weights, d_matrices): each row on its own. scale: of the bumps on the products with the matrices `bumped`."""
    x, weights, dy = (np.asarray(a, np.float64) for a in (x, weights, dy))
    m = {name: np.asarray(a, np.float64) for name, a in matrices.items()}
    act, slope = ACTIVATIONS[activation]
    y, dx, d_weights, d_m = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights), {name: np.zeros_like(a) for name, a in m.items()}
    squares = {name: np.zeros_like(a) for name, a in m.items()}

    def gradient_of(name, expert, a, b):
        d_m[name][expert] += np.outer(a, b)
        squares[name][expert] += np.outer(a**2, b**2)

    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e, row = int(ids[t, k]), np.array([(t if tokens is None else int(tokens[t])) * ids.shape[1] + k])

            def noisy(value, name, pass_, row=row):
                return value + scale * (name in bumped) * bump(np, name, pass_, row, value.shape[0])[0]

            pre = {name: noisy(x[t] @ m[name][e], name, "forward") for name in m if name != "down"}
            drop = keep(np, row, m["up"].shape[2])[0] if masked else 1.0
            hidden = (act(pre["gate"]) * pre["up"] if "gate" in m else act(pre["up"])) * drop
            out = noisy(hidden @ m["down"][e], "down", "forward")
            y[t] += weights[t, k] * out

            d_out = weights[t, k] * dy[t]
            d_weights[t, k] = dy[t] @ out
            d_hidden = noisy(d_out @ m["down"][e].T, "down", "grad_input") * drop
            gradient_of("down", e, hidden, d_out)
            if "gate" in m:
                d_pre = {"up": d_hidden * act(pre["gate"]), "gate": d_hidden * pre["up"] * slope(pre["gate"])}
            else:
                d_pre = {"up": d_hidden * slope(pre["up"])}
            for name, d in d_pre.items():
                dx[t] += noisy(d @ m[name][e].T, name, "grad_input")
                gradient_of(name, e, x[t], d)
    for name in set(bumped) & set(m):  # a weight's row is counted over all experts
        count, inner, outer = d_m[name].shape
        bumps = bump(np, name, "grad_weight", np.arange(count * inner), outer).reshape(count, inner, outer)
        d_m[name] += scale * bumps * (1 + squares[name])
    return y, dx, d_weights, d_m
