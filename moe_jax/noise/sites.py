"""Where noise can act: the names of the sites, their groups, and which kinds each can take."""

from collections.abc import Iterable

from moe_jax.errors import ConfigError, check_known, nearest
from moe_jax.keys import PASSES
from moe_jax.noise.kinds import KINDS

# Each name stands for the sites that a model has of these; a site that is named by itself as well overrides its group.
GROUPS = {
    "experts": ("expert_gate", "expert_up", "expert_down"),
    "attention": ("attention_q", "attention_k", "attention_v", "attention_o"),
    "mlp": ("mlp_gate", "mlp_up", "mlp_down"),
}
MATMULS = ("router_gemm", *GROUPS["experts"], *GROUPS["attention"], *GROUPS["mlp"], "lm_head")
GROUPS["matmuls"] = MATMULS
GROUPS["norms"] = NORMS = ("norm_attention", "norm_moe", "norm_q", "norm_k", "norm_final")  # the scales of these norms
VALUES = ("router_input", "router_logits", "embedding", *NORMS)  # no matmul: perturbed where they are made, in the pass forward alone
SITES = MATMULS + VALUES
OUTSIDE_LAYERS = ("lm_head", "embedding", "norm_final")
# Sites whose noise may reach some of its readers only.
REACHES = {"router_logits": ("selection", "weights", "balance"), "norm_moe": ("experts", "router")}


def members(name: str) -> tuple[str, ...]:
    """The sites that a site's or a group's name stands for; ConfigError for a name that is neither."""
    check_known("noise site", name, (*GROUPS, *SITES))
    return GROUPS.get(name, (name,))


def check(site: str, kind: str, passes: Iterable[str], reach: tuple[str, ...] | None) -> None:
    """ConfigError for a kind, passes or a reach that `site` (or a group) cannot have."""
    values = any(member in VALUES for member in members(site))
    if kind == "accumulation" and values:
        raise ConfigError(f"noise kind 'accumulation' is the error of a matmul, which {site!r} is not; use it at {', '.join(MATMULS)}")
    if kind == "learned" and site != "router_logits":
        raise ConfigError(f"noise kind 'learned' acts at router_logits alone, not at {site!r}")
    if values and "forward" not in passes:
        raise ConfigError(f"noise at {site!r} has passes {tuple(passes)}, but a site that is no matmul acts in the pass forward alone")
    known = REACHES.get(site, ())
    unknown = [name for name in reach or () if name not in known]
    if reach == ():
        raise ConfigError(f"noise at {site!r} reaches nobody; name who reads it ({', '.join(known)}), or leave reach out for all")
    if unknown and not known:
        raise ConfigError(f"noise at {site!r} names a reach {reach}; only {' and '.join(REACHES)} have one")
    if unknown:
        raise ConfigError(f"unknown reach {unknown[0]!r} of {site}{nearest(unknown[0], known)}; known: {', '.join(known)}")


def check_names(kind: str, passes: Iterable[str]) -> None:
    for what, name, known in (("noise kind {!r}", kind, KINDS), *(("name {!r} in passes", name, PASSES) for name in passes)):
        if name not in known:
            raise ConfigError(f"unknown {what.format(name)}{nearest(name, known)}; known: {', '.join(known)}")
