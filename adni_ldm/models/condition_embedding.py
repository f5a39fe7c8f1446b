"""The condition embedding: covariates such as age and sex to the tokens that follow the class tokens.

This file is saved with every conditioned pipeline and loaded from there where adni_ldm is not installed; it
imports nothing of the package, and `ModelMixin` must stay a name of this file, as in class_embedding.py.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

FREQUENCIES = 64  # sines and cosines of a standardized value
SCALE = 4.0  # of the fastest of them: a period of 1.6 SD


@dataclass
class ConditionEmbeddingOutput(BaseOutput):
    """Output of `ConditionEmbedding`: one token for each condition, (B, K, token_dim)."""

    tokens: torch.Tensor


class ConditionEmbedding(ModelMixin, ConfigMixin):
    """One token for each of K conditions: the condition's null token, plus a learned function of its value.

    A number is standardized and embedded as diffusers embeds timesteps (Ho et al. 2020, arXiv:2006.11239,
    appendix B); a category has a learned vector. The functions are 0 before training, so a new condition
    begins at its null token. A missing value has the null token alone, and so has one that was dropped in
    training: any subset of the conditions can be asked for.

    Args:
        conditions: {name: {"mean", "std", "low", "high"}} of a number, the last two its range in training;
            {name: {"categories": names}} of a category.
        token_dim: width D of a token, the denoiser's `cross_attention_dim`.

    Raises ValueError if there is no condition, or a number does not vary.
    """

    @register_to_config
    def __init__(self, conditions: Mapping[str, Mapping], token_dim: int = 256):
        super().__init__()
        if not conditions:
            raise ValueError("conditions={}: give at least one, or no ConditionEmbedding at all")
        for name, about in conditions.items():
            if "categories" not in about and not about["std"] > 0:
                raise ValueError(f"condition {name!r}: std={about['std']} must be above 0")
        self.null = nn.Embedding(len(conditions), token_dim)
        self.sinusoids = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0, scale=SCALE)
        self.learned = nn.ModuleList()  # by place: a ModuleDict does not take every name
        for about in conditions.values():
            if "categories" in about:
                learned = last = nn.Embedding(len(about["categories"]), token_dim)
            else:
                learned = TimestepEmbedding(FREQUENCIES, token_dim)
                last = learned.linear_2
                nn.init.zeros_(last.bias)
            nn.init.zeros_(last.weight)
            self.learned.append(learned)

    @property
    def names(self) -> list[str]:
        """Names of the conditions, in the order of their tokens."""
        return list(self.config.conditions)

    def rows_of(
        self, conditions: Mapping[str, object] | None, count: int, extrapolate: bool = False
    ) -> torch.Tensor:
        """Convert conditions of `count` images to (count, K), float32, NaN for what is not given.

        Args:
            conditions: {name: value}, or a list of `count` values; None, NaN or "" is a missing value.
            extrapolate: allow numbers outside of the range in training.

        Raises ValueError for an unknown condition or category, a number out of range or a list of another
        length, with what is known.
        """
        rows = torch.full((count, len(self.names)), math.nan)
        for name, given in (conditions or {}).items():
            if name not in self.names:
                raise ValueError(f"unknown condition {name!r}; the model's conditions are {self.describe()}")
            # NumPy's integers are numbers, and a tensor of no dimension is one value.
            one = given is None or isinstance(given, (str, numbers.Number)) or getattr(given, "ndim", 1) == 0
            values = [given] * count if one else list(given)
            if len(values) != count:
                raise ValueError(f"condition {name!r} has {len(values)} values for {count} images")
            found = [self._number_of(name, value, extrapolate) for value in values]
            rows[:, self.names.index(name)] = torch.tensor(found)
        return rows

    def _number_of(self, name: str, value: object, extrapolate: bool) -> float:
        value = value.item() if hasattr(value, "item") else value  # of NumPy and torch
        about, text = self.config.conditions[name], str(value).strip()
        if value is None or text.lower() in ("", "nan"):
            return math.nan
        if "categories" in about:
            if text not in about["categories"]:
                raise ValueError(f"{name}={text}: not one of {', '.join(about['categories'])}")
            return float(about["categories"].index(text))
        try:
            number = float(text.removesuffix("+"))  # 90+, as ages above 89 are recorded
        except ValueError as error:
            raise ValueError(f"{name}={text}: not a number") from error
        if not math.isfinite(number) or not (extrapolate or about["low"] <= number <= about["high"]):
            raise ValueError(
                f"{name}={text} is outside of the range in training, {about['low']:g} to {about['high']:g}; "
                "extrapolate allows it"
            )
        return number

    def describe(self) -> str:
        """The conditions with their ranges in training and categories, for people to read."""
        return ", ".join(
            f"{name} ({'/'.join(about['categories'])})"
            if "categories" in about
            else f"{name} ({about['low']:g} to {about['high']:g})"
            for name, about in self.config.conditions.items()
        )

    @torch.no_grad()
    def with_conditions(self, conditions: Mapping[str, Mapping]) -> ConditionEmbedding:
        """Copy the embedding to these conditions and its own; those of the same name keep what they learned.

        A number keeps its mean and SD, which the learned function is of; its range becomes the union of both.
        Categories are matched by name; a new one, as a new condition, begins at the null token. Raises
        ValueError for a condition that is a number in one and a category in the other.
        """
        own, merged = self.config.conditions, {}
        for name, about in {**own, **conditions}.items():
            old = own.get(name, about)
            if ("categories" in old) != ("categories" in about):
                raise ValueError(f"condition {name!r} has categories in the model or the data, not in both")
            if "categories" in about:
                added = [entry for entry in about["categories"] if entry not in old["categories"]]
                merged[name] = {"categories": [*old["categories"], *added]}
            else:
                low, high = min(old["low"], about["low"]), max(old["high"], about["high"])
                merged[name] = {**old, "low": low, "high": high}
        grown = ConditionEmbedding(merged, self.config.token_dim)
        grown.null.weight[: len(own)] = self.null.weight
        for new, old in zip(grown.learned, self.learned):  # those of `own` come first
            for target, source in zip(new.parameters(), old.parameters()):
                target[: len(source)] = source
        return grown.to(self.device)

    def forward(
        self, rows: torch.Tensor, return_dict: bool = True
    ) -> ConditionEmbeddingOutput | tuple[torch.Tensor]:
        """Map rows (B, K), numbers and indices of categories, NaN where missing, to tokens (B, K, token_dim).

        Returns:
            `ConditionEmbeddingOutput` with `.tokens`, or a tuple with them when `return_dict` is False.
        """
        missing = rows.isnan()
        rows = rows.masked_fill(missing, 0)
        tokens = []
        for column, (learned, about) in enumerate(zip(self.learned, self.config.conditions.values())):
            values = rows[:, column]
            if "categories" in about:
                value = learned(values.long())
            else:
                waves = self.sinusoids((values - about["mean"]) / about["std"])  # (B, FREQUENCIES)
                value = learned(waves.to(self.dtype))
            tokens.append(value.masked_fill(missing[:, column, None], 0))
        tokens = self.null.weight + torch.stack(tokens, dim=1)  # (B, K, D)
        return ConditionEmbeddingOutput(tokens=tokens) if return_dict else (tokens,)
