"""moe_jax: what noise does to the router of a mixture-of-experts model, and what protects it.

Names are imported when first used, so that `import moe_jax.studies` (tables and reports) needs no jax.
"""

import importlib

_WHERE = {
    "ModelConfig": "moe_jax.model",
    "DTypePolicy": "moe_jax.model",
    "Model": "moe_jax.model",
    "Output": "moe_jax.model",
    "Draw": "moe_jax.keys",
    "NoiseSpec": "moe_jax.noise",
    "SiteNoise": "moe_jax.noise",
    "RoutingDecision": "moe_jax.routing",
    "RoutingTrace": "moe_jax.routing",
    "Replay": "moe_jax.replay",
    "TraceInfo": "moe_jax.trace_store",
    "TraceReader": "moe_jax.trace_store",
    "TraceWriter": "moe_jax.trace_store",
    "read_trace": "moe_jax.trace_store",
    "write_trace": "moe_jax.trace_store",
    "load_model": "moe_jax.train.saved",
    "MeshSpec": "moe_jax.mesh",
    "load_hf": "moe_jax.hf.load",
    "save_hf": "moe_jax.hf.save",
    "Sampling": "moe_jax.generate",
    "Sampler": "moe_jax.generate",
}
_MODULES = (
    "dispatch",
    "experts",
    "generate",
    "hf",
    "keys",
    "losses",
    "mesh",
    "model",
    "noise",
    "optim",
    "rl",
    "routing",
    "routing_stats",
    "sensitivity",
    "studies",
    "train",
    "upcycle",
)

__all__ = [*_WHERE, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"moe_jax.{name}")
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
