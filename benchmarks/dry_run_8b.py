"""The memory of a training step of Llama 3 8B on eight devices, planned without allocating it.

16 x 2,048 tokens, arithmetic in bfloat16, AdamW, activations computed again. XLA's plan is that for
simulated CPU devices, which keeps what a GPU's would fuse.

python benchmarks/dry_run_8b.py
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaximm.immunisers.gradient import from_penalty
from jaximm.immunisers.language import language_problem
from jaximm.models import llama
from jaximm.objectives import TokenRows
from jaximm.training import sharding
from jaximm.types import Batch

LLAMA3_8B = llama.LlamaConfig(
    vocabulary=128_256, width=4096, layers=32, heads=32, kv_heads=8, head_width=128, hidden=14_336,
    rope_theta=5e5,
)  # fmt: skip
ROWS, LENGTH = 16, 2048


class Rows(NamedTuple):
    """A batch: one task."""

    primary: Batch


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    language = llama.Language(config=LLAMA3_8B, compute_dtype=jnp.bfloat16, remat=True)
    method = from_penalty("task", language_problem(language, optax.adamw(1e-4)), None)
    tokens: Any = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    counted: Any = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_)
    batch: Any = Rows(Batch(tokens, TokenRows(tokens, counted)))

    def everything():
        return llama.every_parameter(llama.init(jax.random.key(0), LLAMA3_8B))

    def adapted():
        params = llama.init(jax.random.key(0), LLAMA3_8B, dtype=jnp.bfloat16)
        return llama.with_adapters(params, jax.random.key(1), rank=16)

    fsdp = sharding.make_sharded({"fsdp": 8}, sharding.FSDP, rows="fsdp")
    cases = {
        "all, FSDP": (everything, fsdp),
        "all, tensor": (
            everything,
            sharding.make_sharded({"tensor": 8}, sharding.TENSOR, rows=None),
        ),
        "all, FSDP 4 x tensor 2": (
            everything,
            sharding.make_sharded({"fsdp": 4, "tensor": 2}, sharding.FSDP_TENSOR, rows="fsdp"),
        ),
        "LoRA r16, FSDP": (adapted, fsdp),
    }
    for name, (start, sharded) in cases.items():
        started = time.perf_counter()
        plan = sharding.dry_run(method, jax.eval_shape(start), batch, sharded)
        print(
            f"{name:24}arguments {plan.arguments / 2**30:5.1f}, temporaries "
            f"{plan.temporaries / 2**30:5.1f} GiB a device; {time.perf_counter() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
