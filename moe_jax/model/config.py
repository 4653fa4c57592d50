"""What a model is: one frozen, validated configuration, and the presets."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from moe_jax import config_tools
from moe_jax.dispatch import IMPLEMENTATIONS
from moe_jax.errors import ConfigError, check_known, nearest
from moe_jax.experts import ACTIVATIONS
from moe_jax.keys import MOST_LAYERS
from moe_jax.noise import Noise, NoiseSpec
from moe_jax.noise.sites import GROUPS, SITES
from moe_jax.routing import MOST_EXPERTS, SCORES

ROPE_STYLES = ("half", "interleaved")
QK_NORMS = ("none", "head", "projection")
REMAT = ("none", "dots", "full")
LOSS_CHUNKS = ("tokens", "vocabulary", "none")


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
    """Number types. The router's matmul and softmax, the norms' statistics and the loss are float32 whatever stands here."""

    params: str = "float32"  # stored parameters and optimizer state
    compute: str = "float32"  # activations and matmul operands; every dot accumulates in float32

    def __post_init__(self):
        for field in ("params", "compute"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise ConfigError(f"dtypes.{field} is {getattr(self, field)!r}; use float32 or bfloat16")


def _check_size(field: str, value: int, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{field} must be a whole number from 1 to {most:,}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: pre-norm blocks of causal attention and a feed-forward that is a mixture of experts, or dense where `dense_layers` says so."""

    vocab_size: int = 512
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as heads (MHA); fewer: grouped-query attention
    head_dim: int | None = None  # None: d_model / num_heads
    max_seq_len: int = 512

    num_experts: int = 8  # 0: a dense model
    experts_per_token: int = 2
    d_expert: int = 128  # width of one expert
    dense_layers: tuple[int, ...] = ()  # absolute indices of layers with a dense feed-forward
    d_ff: int | None = None  # width of the dense feed-forward; None: d_expert
    gated: bool = True  # act(gate) * up, or act(up)
    activation: str = "silu"
    router_score: str = "softmax"
    renormalise: bool = True  # weights of the chosen experts sum to 1
    learned_noise: bool = False  # a matrix that learns how much noise of kind "learned" each logit gets
    selection_bias: bool = False  # a bias added to sigmoid scores for the selection alone

    rope_theta: float = 10_000.0
    rope_style: str = "half"  # rotate the two halves of a head, or adjacent pairs
    norm_eps: float = 1e-6
    qk_norm: str = "none"  # RMSNorm on q and k: per head, or over the whole projection
    attention_bias: bool = False  # biases on q, k and v
    output_bias: bool = False  # bias on attention's output projection
    fused_qkv: bool = False  # one matrix for q, k and v, which Muon then orthogonalises as one
    sliding_window: int | None = None  # a token attends to at most this many tokens, itself included
    clip_qkv: float | None = None  # q, k and v are cut off at this size, before they are turned

    tie_embeddings: bool = True
    scale_embedding: bool = False  # embeddings times sqrt(d_model)
    init_std: float = 0.02
    # at six sites: embedding, attention weights, attention output, expert hidden, feed-forward output, before the head
    dropout: float = 0.0

    dtypes: DTypePolicy = DTypePolicy()
    remat: str = "none"  # what a backward pass computes again: nothing, all but matmul results, or whole blocks; expert ids never
    dispatch: str | None = None  # an implementation by name; None: picked by platform and mesh
    exchange_factor: float = 2.0  # buffers of dispatch="all_to_all", in mean loads; what does not fit is counted and sent by all_gather
    dispatch_chunks: int = 1  # parts of a device's tokens that go through a layer's experts one after the other, in the memory of one
    scan_layers: bool = True  # False: layers unrolled, for comparison
    loss_chunk: str = "tokens"  # cross-entropy in chunks of tokens (fast), of the vocabulary (small), or whole
    loss_chunk_size: int = 2048

    def __post_init__(self):
        object.__setattr__(self, "dense_layers", tuple(sorted(self.dense_layers)))
        self._check_choices()
        self._check_sizes()

    def _check_choices(self):
        choices = {
            "activation": ACTIVATIONS,
            "router_score": SCORES,
            "rope_style": ROPE_STYLES,
            "qk_norm": QK_NORMS,
            "remat": REMAT,
            "loss_chunk": LOSS_CHUNKS,
            "dispatch": (None, *IMPLEMENTATIONS),
        }
        for field, known in choices.items():
            check_known(field, getattr(self, field), known)
        if self.selection_bias and self.router_score != "sigmoid":
            raise ConfigError(f"selection_bias goes with router_score=sigmoid, got {self.router_score!r}")

    def _check_sizes(self):
        for field in ("vocab_size", "d_model", "num_heads", "max_seq_len", "d_expert", "loss_chunk_size", "dispatch_chunks"):
            _check_size(field, getattr(self, field))
        _check_size("num_layers", self.num_layers, MOST_LAYERS)
        _check_size("num_kv_heads", self.kv_heads)
        _check_size("head_dim", self.head_width)
        _check_size("d_ff", self.dense_width)
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}; change one of them or set head_dim")
        if self.head_width % 2:
            raise ConfigError(f"head_dim={self.head_width} must be even: rotary embeddings turn pairs")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}")
        if self.num_experts != 0:
            _check_size("num_experts", self.num_experts, MOST_EXPERTS)
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(f"experts_per_token={self.experts_per_token} must be between 1 and num_experts={self.num_experts}")
        outside = [layer for layer in self.dense_layers if not 0 <= layer < self.num_layers]
        if outside:
            raise ConfigError(f"dense_layers {outside} do not exist: the model has layers 0 to {self.num_layers - 1}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 <= self.init_std < math.inf:
            raise ConfigError(f"init_std must be finite and not negative, got {self.init_std}")
        for field in ("exchange_factor", "norm_eps", "rope_theta"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be finite and above 0, got {getattr(self, field)}")
        if self.clip_qkv is not None and not 0 < self.clip_qkv < math.inf:
            raise ConfigError(f"clip_qkv must be finite and above 0, or none, got {self.clip_qkv}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window must be at least 1 or none, got {self.sliding_window}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def dense_width(self) -> int:
        return self.d_expert if self.d_ff is None else self.d_ff

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers that route."""
        return tuple(layer for layer in range(self.num_layers) if self.num_experts and layer not in self.dense_layers)

    @property
    def noise_sites(self) -> tuple[str, ...]:
        """The sites at which noise can act in this model."""
        absent = set()
        absent |= set() if self.moe_layers else {"router_input", "router_logits", "router_gemm", *GROUPS["experts"]}
        absent |= set() if len(self.moe_layers) < self.num_layers else set(GROUPS["mlp"])
        absent |= set() if self.gated else {"expert_gate", "mlp_gate"}
        absent |= set() if self.qk_norm != "none" else {"norm_q", "norm_k"}
        return tuple(site for site in SITES if site not in absent)

    def what(self) -> dict[str, Any]:
        """The fields that decide what trained parameters compute, not how: without dispatch, recomputation, number types, chunks, and how they were trained."""
        how = "dtypes remat dispatch dispatch_chunks exchange_factor scan_layers loss_chunk loss_chunk_size init_std dropout max_seq_len".split()
        return {name: value for name, value in config_tools.config_dict(self).items() if name not in how}

    def routing_hash(self) -> str:
        """16 hex digits of what the model computes, of the fields that have not their default: a field that is added later changes no hash."""
        defaults = config_tools.config_dict(ModelConfig())
        return config_tools.digest({name: value for name, value in self.what().items() if value != defaults[name]})[:16]

    def resolve(self, spec: NoiseSpec) -> Noise:
        """The spec over this model's layers and sites; raises ConfigError for what the model does not have."""
        if not self.learned_noise and any(noise.kind == "learned" for noise in spec.sites.values()):
            raise ConfigError("noise kind 'learned' needs a model with learned_noise=True, which has the matrix that it learns")
        return spec.resolve(self.num_layers, self.noise_sites)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A changed copy, validated again; an unknown field is an error that names the nearest one."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown model field {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """A named configuration, with changes."""
        check_known("model preset", name, PRESETS)
        return cls(**PRESETS[name]).replace(**changes)


# The small gate-noise study: 79,059,840 parameters, of which 36,592,512 work on a token.
_SEED: dict[str, Any] = dict(
    vocab_size=49_152,
    d_model=384,
    num_layers=6,
    num_heads=8,
    max_seq_len=512,
    num_experts=8,
    experts_per_token=2,
    d_expert=1536,
    gated=False,
    rope_style="interleaved",
    norm_eps=1.1920929e-07,  # machine epsilon of float32, torch's default
    fused_qkv=True,
    scale_embedding=True,
    dropout=0.1,
)

_QWEN3: dict[str, Any] = dict(qk_norm="head", rope_theta=1e6, tie_embeddings=False)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # for tests: every part is there, a step takes milliseconds
    "tiny": dict(vocab_size=260, d_model=32, num_layers=2, num_heads=4, num_experts=4, d_expert=48, max_seq_len=64),
    # the seed's shape at a size that two cores train in seconds
    "quick": _SEED | dict(vocab_size=2048, d_model=64, num_layers=4, num_heads=4, d_expert=128, max_seq_len=128),
    # the same in minutes
    "small": _SEED | dict(vocab_size=4096, d_model=192, num_layers=4, num_heads=6, d_expert=512, max_seq_len=256),
    "seed_79m": _SEED,
    # Qwen3's parts at a size for tests: narrow experts, heads wider than d_model / num_heads, an untied head
    "qwen3_tiny": _QWEN3
    | dict(vocab_size=260, d_model=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=16, experts_per_token=4)
    | dict(d_expert=24, d_ff=96, max_seq_len=128),
    # as published: 30,532,122,624 parameters, 3.35e9 of them active
    "qwen3_30b_a3b": _QWEN3
    | dict(
        vocab_size=151_936, d_model=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128, experts_per_token=8
    )
    | dict(d_expert=768, d_ff=6144, max_seq_len=40_960),
    # OLMoE-1B-7B-0924: 6,919,161,856 parameters, 1.28e9 active
    "olmoe_1b_7b": dict(vocab_size=50_304, d_model=2048, num_layers=16, num_heads=16, num_experts=64, experts_per_token=8, d_expert=1024)
    | dict(max_seq_len=4096, qk_norm="projection", renormalise=False, norm_eps=1e-5, tie_embeddings=False),
    # Mixtral-8x7B-v0.1: 46,702,792,704 parameters, 12.9e9 active
    "mixtral_8x7b": dict(vocab_size=32_000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, num_experts=8, experts_per_token=2)
    | dict(d_expert=14_336, max_seq_len=32_768, rope_theta=1e6, norm_eps=1e-5, tie_embeddings=False),
}
