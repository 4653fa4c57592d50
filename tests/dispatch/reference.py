"""What every dispatch must compute, as a NumPy loop over tokens and slots in float64, with the hooks' perturbations where the contract puts them."""

import zlib

import numpy as np

from moe_jax.experts import plain_product


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


def bumpy_product(context, site, pass_, rows, a, b, contract):
    """The product hook that the reference's `scale` stands for; grad_weight is left alone, as the contract says."""
    import jax.numpy as jnp

    out = plain_product(context, site, pass_, rows, a, b, contract)
    return out if pass_ == "grad_weight" else out + context["scale"] * bump(jnp, site, pass_, rows, out.shape[1])


def keep_mask(context, rows, width):
    import jax.numpy as jnp

    del context
    return keep(jnp, rows, width)


def moe(x, ids, weights, matrices, dy, activation="silu", scale=0.0, masked=False, tokens=None):
    """(y, dx, d_weights, d_matrices): each row on its own. scale: of the bumps on forward and grad_input products."""
    x, weights, dy = (np.asarray(a, np.float64) for a in (x, weights, dy))
    m = {name: np.asarray(a, np.float64) for name, a in matrices.items()}
    act, slope = ACTIVATIONS[activation]
    y, dx, d_weights, d_m = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights), {name: np.zeros_like(a) for name, a in m.items()}
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e, row = int(ids[t, k]), np.array([(t if tokens is None else int(tokens[t])) * ids.shape[1] + k])

            def noisy(value, name, pass_, row=row):
                return value + scale * bump(np, f"expert_{name}", pass_, row, value.shape[0])[0]

            pre = {name: noisy(x[t] @ m[name][e], name, "forward") for name in m if name != "down"}
            drop = keep(np, row, m["up"].shape[2])[0] if masked else 1.0
            hidden = (act(pre["gate"]) * pre["up"] if "gate" in m else act(pre["up"])) * drop
            out = noisy(hidden @ m["down"][e], "down", "forward")
            y[t] += weights[t, k] * out

            d_out = weights[t, k] * dy[t]
            d_weights[t, k] = dy[t] @ out
            d_hidden = noisy(d_out @ m["down"][e].T, "down", "grad_input") * drop
            d_m["down"][e] += np.outer(hidden, d_out)
            if "gate" in m:
                d_pre = {"up": d_hidden * act(pre["gate"]), "gate": d_hidden * pre["up"] * slope(pre["gate"])}
            else:
                d_pre = {"up": d_hidden * slope(pre["up"])}
            for name, d in d_pre.items():
                dx[t] += noisy(d @ m[name][e].T, name, "grad_input")
                d_m[name][e] += np.outer(x[t], d)
    return y, dx, d_weights, d_m
