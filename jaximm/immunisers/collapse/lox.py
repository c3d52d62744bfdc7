r"""LoX: extrapolate what alignment did to each matrix along its strongest directions.

    dW = W_aligned - W_base = U S V^T,    released: W_aligned + factor U_k S_k V_k^T

for every kernel, k = `rank`; biases and scales stay aligned. The base is the problem's
`reference`, the model before its alignment: the run then only extrapolates, as published
(training-free). Without a reference the run is the alignment itself: it starts from the base and
descends the primary loss (in the primary batch stand prompts with the safe answer as well), and
`finish` extrapolates.

The factor is to be chosen by utility: a low-rank shift of the logits, which alignment may be, grows
with it, and a model that refuses everything looks safe. No released code was found to differ from.

Perin et al. (2025), LoX: low-rank extrapolation robustifies LLM safety against fine-tuning,
https://arxiv.org/abs/2506.15606.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaximm.immunisers.about import About
from jaximm.immunisers.gradient import Weighted, from_objective
from jaximm.immunisers.kernels import over_kernels, refuse_adapters
from jaximm.immunisers.problem import Problem, check_run
from jaximm.types import Immuniser, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoxConfig:
    """Extrapolates the low-rank part of what alignment has changed in each matrix.

    Attributes:
      rank: k, >= 1; more than a matrix has is all.
      factor: of the low-rank part that is added, >= 0.
      steps: updates of the alignment; 1 serves where the problem has a reference.
      batch_size: rows of each task a batch; None: all.
    """

    about: ClassVar = About(
        title="LoX",
        source="Perin et al. (2025), LoX: low-rank extrapolation robustifies LLM safety against "
        "fine-tuning, https://arxiv.org/abs/2506.15606",
        against="users who fine-tune an aligned model a little, on benign or harmful rows",
        broken_by="fine-tuning for longer, or taking the added part off again (it is of low rank)",
        traits=frozenset({"needs_harmful_head"}),
    )

    rank: int = 6
    factor: float = 1.25
    steps: int = 300
    batch_size: int | None = None

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer >= 1, got {self.rank!r}.")
        if not 0 <= self.factor < math.inf:
            raise ValueError(f"factor must be finite and >= 0, got {self.factor}.")
        check_run(self.steps, self.batch_size)


def lox(config: LoxConfig, problem: Problem) -> Immuniser:
    """Aligns where there is no reference, and extrapolates at the end.

    Raises:
      ValueError: what `from_objective` refuses; adapters of a language model, when a run starts.
    """
    if problem.reference is not None:  # aligned already: nothing moves, by weight decay neither
        problem = dataclasses.replace(problem, optimiser=optax.set_to_zero())

    def objective(params, batches, base, rng_key):
        del rng_key
        kept = problem.training_losses(params, batches.primary)
        return {"task_loss": Weighted(kept, problem.weights(batches.primary))}, {}, base

    def memory(params):
        refuse_adapters("lox", params)
        return problem.reference_of(params)

    method = from_objective("lox", problem, objective, init_memory=memory)
    return method._replace(
        finish=lambda state: extrapolated(state.params, state.memory, config.rank, config.factor)
    )


def extrapolated(aligned: Params, base: Params, rank: int, factor: float) -> Params:
    """Each kernel plus `factor` times the best approximation of rank k to what it has changed.

    >>> import jax.numpy as jnp
    >>> base, aligned = {"w": jnp.zeros((2, 2))}, {"w": jnp.diag(jnp.array([4.0, 1.0]))}
    >>> extrapolated(aligned, base, 1, 0.5)["w"].tolist()
    [[6.0, 0.0], [0.0, 1.0]]
    """
    return over_kernels(
        lambda kernel, start: kernel + factor * low_rank(kernel - start, rank), aligned, base
    )


def low_rank(matrix: Float[Array, "*stacked in out"], rank: int) -> Float[Array, "*stacked in out"]:
    """The best approximation of a rank, in the Frobenius norm."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    k = min(rank, values.shape[-1])
    return left[..., :k] * values[..., None, :k] @ right[..., :k, :]
