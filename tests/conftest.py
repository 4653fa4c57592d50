"""Eight CPU devices, no accelerator, and strict shapes: set before jax is imported anywhere."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """The tests of meshes would pass on one device without testing anything."""
    assert jax.device_count() == 8
