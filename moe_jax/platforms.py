"""Which platform a program is traced for: the one that is attached, or another one that it will only be compiled for.

Where one form of a computation is fast on a CPU and another on an accelerator, the form is chosen while the program is traced. The choice is part of the
key of jax's caches, so that a function traced for one platform is traced again for another.
"""

from contextlib import AbstractContextManager

import jax

_target = jax.make_user_context(None)


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return _target.value or jax.default_backend()


def tracing_for(name: str) -> AbstractContextManager:
    """In a `with` block, `platform()` is `name`."""
    return _target(name)
