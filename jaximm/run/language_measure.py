"""What is measured of a language model on texts: condition numbers at its sites, and quality.

Rows of a site are positions whose next token counts in the text's loss, so that K of the final
hidden states is the Gauss-Newton factor of that loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaximm import linalg, measures
from jaximm.data.text import TextTask, TokenSplit, next_tokens
from jaximm.measures.conditioning import rounding
from jaximm.models import llama
from jaximm.models.flat import FlatParams
from jaximm.models.llama import Language
from jaximm.types import Batch

NULL = "null"
"""The control whose two texts are halves of one."""


def counted_positions(batch: Batch) -> jax.Array:
    """Of `Language.activations`' rows, those whose next token counts."""
    return batch.y.mask[:, 1:].reshape(-1)


ROWS_AT_ONCE = 8
"""Texts of one pass; parts are filled up with rows that do not count."""

SPLITS = ("train", "held_out")

Streams = dict[str, measures.RowStream]
"""By site."""

Spectra = dict[str, dict[str, Streams]]
"""By text, split and site."""


def spectra(
    language: Language, params: FlatParams, tasks: Mapping[str, TextTask], *, rows: int
) -> Spectra:
    """The triangles of every text's rows at every site; those of the null are halves of primary.

    Args:
      language: with the sites that are measured.
      params: of the model.
      tasks: by role; primary is one.
      rows: at most so many of each part of a text.
    """
    streams: Spectra = {}
    for role, task in tasks.items():
        parts = {split: some_rows(getattr(task, split), rows) for split in SPLITS}
        if role == "primary":  # its halves are the null's texts, so that no row is passed twice
            streams |= _with_halves(language, params, parts)
        else:
            streams[role] = {
                split: _streams(language, params, part) for split, part in parts.items()
            }
    return streams


def _with_halves(
    language: Language, params: FlatParams, parts: Mapping[str, TokenSplit]
) -> Spectra:
    """The primary text, and its even and odd documents where each split has both."""
    halves: dict[int, dict[str, Streams]] = {0: {}, 1: {}}
    for split, part in parts.items():
        for half, streams in halves.items():
            own = taken(part, np.flatnonzero(part.document % 2 == half))
            if len(own.tokens):
                streams[split] = _streams(language, params, own)
    primary = {}
    for split in parts:
        there = [streams[split] for streams in halves.values() if split in streams]
        primary[split] = functools.reduce(_both, there)
    if any(len(streams) < len(parts) for streams in halves.values()):
        return {"primary": primary}
    return {"primary": primary, f"{NULL} a": halves[0], f"{NULL} b": halves[1]}


def _both(first: Streams, second: Streams) -> Streams:
    return {site: measures.joined(first[site], second[site]) for site in first}


def some_rows(split: TokenSplit, rows: int) -> TokenSplit:
    """At most so many rows, spread over the part."""
    n = len(split.tokens)
    places = np.arange(n) if n <= rows else np.linspace(0, n - 1, rows).round().astype(int)
    return taken(split, places)


def taken(split: TokenSplit, places: np.ndarray | slice) -> TokenSplit:
    """Some rows."""
    return split._replace(
        tokens=split.tokens[places], mask=split.mask[places], document=split.document[places]
    )


def _streams(language: Language, params: FlatParams, split: TokenSplit) -> Streams:
    """The triangle of the counted rows at each site, `ROWS_AT_ONCE` texts at a time."""
    weights, add = llama.every_parameter(params), _added(language)
    shapes = jax.eval_shape(language.activations, weights, jnp.asarray(split.tokens[:1]))
    dtype = jnp.zeros(()).dtype
    streams = {site: measures.row_stream(rows.shape[1], dtype) for site, rows in shapes.items()}
    for start in range(0, len(split.tokens), ROWS_AT_ONCE):
        streams = add(streams, weights, filled(split, start))
    return streams


def filled(split: TokenSplit, start: int, count: int = ROWS_AT_ONCE) -> Batch:
    """`count` rows from `start` on; what is missing is a row again that does not count."""
    places = np.arange(start, start + count)
    there = places < len(split.tokens)
    places = np.minimum(places, len(split.tokens) - 1)
    tokens, mask = split.tokens[places], split.mask[places] & there[:, None]
    return Batch(jnp.asarray(tokens), next_tokens(jnp.asarray(tokens), jnp.asarray(mask)))


@functools.lru_cache(maxsize=8)
def _added(language: Language):
    @jax.jit
    def add(streams, weights, batch):
        counted = counted_positions(batch)
        return {
            site: measures.add_rows(streams[site], rows, counted)
            for site, rows in language.activations(weights, batch.x).items()
        }

    return add


class SiteKappa(TypedDict):
    """The damped kappa of a site with its bracket, rank and number of rows."""

    log_kappa: float
    bracket: list[float | None]
    tolerance: float
    rank: int
    tokens: int
    dominated_by: str
    dtype: str


class SiteRow(TypedDict):
    """One site, split and pair of texts; as read back, what was not finite is None."""

    site: str
    split: str
    against: str  # "harmful", "control", or the null
    primary: dict[str, SiteKappa]  # by "before" and "after"
    other: dict[str, SiteKappa]
    log_ratio_primary: float | None
    log_ratio_other: float | None
    log_rir: float | None
    log_rir_limit: float | None


def compared(before: Spectra, after: Spectra, *, damping: float) -> list[SiteRow]:
    """A row for each site, other text and split: kappas before and after, RIR and its limit.

    The limit is that of any invertible linear map of the site, on the rows of that split.
    """
    pairs = {"harmful": ("primary", "harmful")}
    if "control" in before:
        pairs["control"] = ("primary", "control")
    if f"{NULL} a" in before:
        pairs[NULL] = (f"{NULL} a", f"{NULL} b")

    def row(site: str, split: str, against: str) -> SiteRow:
        def rows_of(spectra: Spectra, text: str) -> measures.TaskRows:
            own = spectra[text]
            return measures.stream_rows(own[split][site], own["train"][site], damping=damping)

        primary, other = (
            {
                when: _kappa(rows_of(spectra, text), spectra[text][split][site])
                for when, spectra in (("before", before), ("after", after))
            }
            for text in pairs[against]
        )
        ratio_primary, ratio_other = (
            kappas["after"]["log_kappa"] - kappas["before"]["log_kappa"]
            for kappas in (primary, other)
        )
        limit = measures.log_rir_limit(*(rows_of(before, text) for text in pairs[against]))
        return {
            "site": site,
            "split": split,
            "against": against,
            "primary": primary,
            "other": other,
            "log_ratio_primary": ratio_primary,
            "log_ratio_other": ratio_other,
            "log_rir": ratio_other - ratio_primary,
            "log_rir_limit": float(limit),
        }

    sites = before["primary"]["train"]
    return [row(site, split, name) for site in sites for split in SPLITS for name in pairs]


def _kappa(rows: measures.TaskRows, stream: measures.RowStream) -> SiteKappa:
    damped = measures.kappas(rows, rtol=rounding(jnp.float32)).damped
    return {
        "log_kappa": float(damped.log_kappa),
        "bracket": [float(damped.lower), float(damped.upper)],
        "tolerance": float(damped.tolerance),
        "rank": int(damped.rank),
        "tokens": int(stream.count),
        "dominated_by": linalg.DOMINANCE[int(damped.dominated_by)],
        "dtype": str(stream.triangle.dtype),
    }


class Quality(NamedTuple):
    """How well a text is predicted.

    Attributes:
      tokens: that were predicted.
      nats: a token.
      right: share of tokens that are the likeliest.
      bits: a character.
    """

    tokens: int
    nats: float
    right: float
    bits: float

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)


def quality(
    language: Language, params: FlatParams, split: TokenSplit, *, at_once: int = ROWS_AT_ONCE
) -> Quality:
    """Over the tokens of a part of a text that count; bits = nats / log 2 / characters a token."""
    weights, measure = llama.every_parameter(params), _summed(language)
    sums = jnp.zeros(3)
    for start in range(0, len(split.tokens), at_once):
        sums = measure(sums, weights, filled(split, start, at_once))
    nats, right, tokens = np.asarray(sums, float)
    nats, right = nats / tokens, right / tokens
    bits = nats / math.log(2) / split.characters_per_token
    return Quality(int(tokens), nats, right, bits)


@functools.lru_cache(maxsize=8)
def _summed(language: Language):
    @jax.jit
    def add(sums, weights, batch):
        counts = language.weights(batch).astype(sums.dtype)
        objective, outputs = language.objective, language.outputs(weights, batch.x)
        of_rows = objective.losses(outputs, batch.y), objective.scores(outputs, batch.y)
        totals = [jnp.sum(numbers.astype(sums.dtype) * counts) for numbers in of_rows]
        return sums + jnp.stack([*totals, jnp.sum(counts)])

    return add
