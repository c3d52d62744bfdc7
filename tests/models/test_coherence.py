"""What a decoder writes: repetition, and nats under a public model."""

import dataclasses

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
from language import CONFIG

from jaximm.models import llama
from jaximm.models.adapters import lora
from jaximm.models.llama import Language, coherence

MODEL = Language(config=CONFIG)
PARAMS = language.params(dtype=jnp.float32)
PROMPTS = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
STEPS = 5


@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_of_distinct_runs_is_that_of_counting(seed):
    tokens = np.random.default_rng(seed).integers(0, 2, (3, 13))
    counted = [len({tuple(row[i : i + 3]) for i in range(11)}) / 11 for row in tokens.tolist()]
    np.testing.assert_allclose(coherence.distinct_share(jnp.asarray(tokens)), counted)


def readings(params, adapters=(), model=MODEL):
    read = coherence.reader(model, MODEL, STEPS)
    return jax.jit(read)(PARAMS, PROMPTS, params, adapters)


@pytest.mark.heavy
def test_readings_are_of_the_models_own_text_under_the_public_one():
    other = language.params(3, jnp.float32)
    found = readings(other)
    text = PROMPTS
    for _ in range(STEPS):  # without a cache
        logits = llama.logits(other, text, CONFIG)[:, -1]
        text = jnp.concatenate([text, jnp.argmax(logits, -1)[:, None].astype(jnp.int32)], axis=1)
    logs = jax.nn.log_softmax(llama.logits(PARAMS, text, CONFIG))[:, 2:-1]
    nats = -jnp.mean(jnp.take_along_axis(logs, text[:, 3:, None], axis=-1))
    assert float(found["base_nats"]) == pytest.approx(float(nats), rel=1e-4)
    assert float(found["distinct"]) == pytest.approx(
        float(jnp.mean(coherence.distinct_share(text[:, 3:])))
    )
    # One that says one word is caught by its runs, and the public model itself by neither.
    dull = PARAMS | {"norm.scale": jnp.zeros_like(PARAMS["norm.scale"])}
    assert float(readings(dull)["distinct"]) == pytest.approx(1 / 3)
    assert float(readings(PARAMS)["base_nats"]) < float(found["base_nats"])


@pytest.mark.heavy
def test_adapters_count():
    factors = lora.start(
        PARAMS, lambda path, _: path.endswith("up.kernel"), 2, jax.random.key(0),
        stacked=llama.stacked_axes,
    )  # fmt: skip
    moved = {
        path: one._replace(b=jax.random.normal(jax.random.key(1), one.b.shape, one.b.dtype))
        for path, one in factors.items()
    }
    whole = lora.merged(PARAMS, moved, 1.0)
    beside, merged = readings(PARAMS, moved), readings(whole)
    for name in beside:
        assert float(beside[name]) == pytest.approx(float(merged[name]), rel=1e-5)


def test_texts_too_short_to_repeat_are_refused():
    with pytest.raises(ValueError, match="need steps >= 3 to see what is repeated, got 2"):
        coherence.reader(MODEL, MODEL, 2)
    short = Language(config=dataclasses.replace(CONFIG, context=4))
    with pytest.raises(ValueError, match="do not fit"):
        jax.eval_shape(coherence.reader(short, short, STEPS), PARAMS, PROMPTS, PARAMS)
