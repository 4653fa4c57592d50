"""moe_jax: what noise does to the router of a mixture-of-experts model, and what protects it.

Names are imported when first used, so that `import moe_jax.studies` (tables and reports) needs no jax.
"""

import importlib

_NAMES = {
    "model": "ModelConfig DTypePolicy Model Output",
    "keys": "Draw",
    "noise": "NoiseSpec SiteNoise",
    "routing": "RoutingDecision RoutingTrace",
    "replay": "Replay",
    "trace_store": "TraceInfo TraceReader TraceWriter read_trace write_trace",
    "train.saved": "load_model",
    "mesh": "MeshSpec",
    "hf.load": "load_hf",
    "hf.save": "save_hf",
    "generate": "Sampling Sampler",
}
_WHERE = {name: f"moe_jax.{module}" for module, names in _NAMES.items() for name in names.split()}
_MODULES = (
    "dispatch experts generate hf keys losses mesh model noise optim rl routing routing_stats sensitivity studies train upcycle".split()
)

__all__ = [*_WHERE, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"moe_jax.{name}")
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
