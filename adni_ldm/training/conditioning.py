"""Conditions in training: the embedding of the data's columns, and their dropout."""

from collections.abc import Sequence

import torch

from adni_ldm.data.conditions import condition_rows, describe_conditions
from adni_ldm.data.slices import SliceTensors
from adni_ldm.errors import UserError
from adni_ldm.models.condition_embedding import ConditionEmbedding
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.training.batch_sampling import BatchRandom


def embed(
    names: Sequence[str],
    token_dim: int,
    start: ClassConditionalLDMPipeline | None,
    train: SliceTensors,
    val: SliceTensors,
) -> ConditionEmbedding | None:
    """The embedding of the conditions of these names, and of those of the model that `start` is.

    `token_dim` is the tokens' width without `start`. Sets the `condition_rows` (N, K) of the slices; a
    condition that is not in the data is missing there. Returns None without conditions. Raises UserError for
    a column that cannot be a condition.
    """
    about = describe_conditions({name: train.conditions[name] for name in names})
    earlier = start.condition_embedding if start else None
    width = start.class_embedding.config.token_dim if start else token_dim
    if not about and earlier is None:
        return None
    try:
        embedding = earlier.with_conditions(about) if earlier else ConditionEmbedding(about, width)
    except ValueError as error:
        raise UserError(f"--conditions: {error}") from error
    for slices in (train, val):
        slices.condition_rows = condition_rows(embedding.config.conditions, slices.conditions, len(slices))
    return embedding


def drop(
    conditions: torch.Tensor | None, everything: torch.Tensor, rng: BatchRandom, rate: float
) -> torch.Tensor | None:
    """Replace conditions (B, K) by NaN: all of an image where `everything` (B,), else each at this rate."""
    if conditions is None:
        return None
    each = torch.stack([rng.uniform() < rate for _ in conditions[0]], dim=1)  # (B, K)
    return conditions.masked_fill(each | everything[:, None], torch.nan)
