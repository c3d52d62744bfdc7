"""`jaximm rebalance`: a language model in canonical weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from jaximm.cli.common import Common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebalance(Common):
    """Write a language model in canonical weights: the same function, whatever gauge it came in.

    It needs the weights alone. It undoes defences that only rescale a model inside, and repairs
    what such scales cost when weights are rounded to few bits.

    Attributes:
      model: a folder of the Hugging Face hub (config.json, safetensors), or a .gguf file.
      out: a new folder.
      norms: one: fold the scales of norms into what follows; columns: give that equal lengths.
    """

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    norms: Literal["one", "columns"] = "one"


def run_command(args: Rebalance, command: str) -> None:
    """Writes the model and prints what its scales were."""
    del command
    from jaximm.run.rebalance import rebalance

    written = rebalance(args.model, args.out, norms=args.norms)
    print(f"weights that came in: {written.precision}")
    for name, spread in written.spreads.items():
        print(f"{name}: factors {spread:.3g} apart")
    print(
        f"largest change of a logit: {written.change:.1e} (of logits up to {written.largest:.1f})"
    )
    print(f"rebalance: {written.path}")
