"""SmolLM2-135M-Instruct itself: what its real weights say, and the mixture made of it. Fetched: python -m launch.data --fetch=smollm2_135m,wiki"""

import jax
import numpy as np
import pytest

from moe_jax.generate import Sampler, Sampling
from moe_jax.model import Model
from moe_jax.train import sources, texts, tokenizers
from moe_jax.train.saved import load_model
from moe_jax.upcycle import upcycle, upcycled

CACHED = all(sources.is_cached(sources.CATALOGUE[name]) for name in ("smollm2_135m", "wiki"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CACHED, reason="SmolLM2 and wiki are not in the cache; python -m launch.data --fetch=smollm2_135m,wiki"),
]


@pytest.fixture(scope="module")
def smollm2():
    saved = load_model("smollm2_135m")
    return Model(saved.config), saved.params, tokenizers.load("smollm2")


def test_it_has_its_parameters_and_knows_the_capital(smollm2):
    model, params, tokenizer = smollm2
    assert model.parameter_count() == 134_515_008
    found = Sampler(model)(params, [tokenizer.encode("The capital of France is").tolist()], Sampling(max_tokens=2))
    print("\nThe capital of France is" + tokenizer.decode(found.sampled(0)))
    assert tokenizer.decode(found.sampled(0)) == " Paris."


def test_cross_entropy_on_wiki_leads(smollm2):
    """Of 40 lead sections at random, each by itself: near the 2.99 nats that transformers finds with these weights (on 40 others)."""
    model, params, tokenizer = smollm2
    documents = texts.documents("wiki")
    total = count = 0.0
    loss = jax.jit(model.loss)
    for number in np.random.default_rng(0).choice(len(documents), 40, replace=False):
        ids = tokenizer.encode(documents[number])[:256]
        text = np.zeros((1, 257), np.int32)
        text[0, : len(ids)] = ids
        weights = (np.arange(256) < len(ids) - 1).astype(np.float32)[None]
        metrics = loss(params, text[:, :-1], text[:, 1:], weights)[1]
        total, count = total + float(metrics["loss"][0]), count + float(metrics["loss"][1])
    print(f"\ncross-entropy {total / count:.3f} nats over {count:.0f} tokens of 40 lead sections")
    assert 2.8 < total / count < 3.2


def test_upcycled_to_four_experts_it_says_the_same(smollm2):
    model, params, tokenizer = smollm2
    mixture = Model(upcycled(model.config, 4, 2))
    assert mixture.parameter_count() == 373_462_848
    ids = tokenizer.encode("The tower was built for the World's Fair of 1889, and its height was then the greatest of any structure.")[None]
    wanted, found = (np.asarray(jax.jit(m.apply)(p, ids).logits) for m, p in ((model, params), (mixture, upcycle(model, params, mixture))))
    print(f"\nlargest difference of a logit {np.abs(wanted - found).max():.1e}, of logits up to {np.abs(wanted).max():.0f}")
    assert np.abs(wanted - found).max() < 1e-4
