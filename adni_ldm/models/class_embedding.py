"""The class embedding: class labels to the tokens that the denoiser's cross-attention reads.

This file is saved with every pipeline and loaded from there where adni_ldm is not installed, so it imports
nothing of the package. diffusers finds the loading method of a custom component by looking for its base class
in the component's module: `ModelMixin` must stay a name of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class ClassEmbeddingOutput(BaseOutput):
    """Output of `ClassEmbedding`: class tokens (B, tokens_per_class, token_dim)."""

    tokens: torch.Tensor


class ClassEmbedding(ModelMixin, ConfigMixin):
    """Learned tokens of each class, and of the null class.

    The last entry is the null class of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598):
    label dropout replaces labels by it in training; sampling extrapolates from its prediction.

    Args:
        class_names: names in the order of their labels; label k is `class_names[k]`.
        token_dim: width D of a token, the denoiser's `cross_attention_dim`.
        tokens_per_class: number of tokens that represent a class in cross-attention.

    Raises ValueError if a class name occurs twice, or cannot be the name of a folder.
    """

    @register_to_config
    def __init__(
        self,
        class_names: Sequence[str] = ("AD", "NC"),
        token_dim: int = 256,
        tokens_per_class: int = 2,
    ):
        super().__init__()
        if len(set(class_names)) != len(class_names):
            raise ValueError(f"class_names={list(class_names)} has a name twice")
        if any(not name or name[0] in ".=+-@" or set(name) & set("/\\\0") for name in class_names):
            rule = "each must be able to name a folder, and begin with none of = + - @"
            raise ValueError(f"class_names={list(class_names)}: {rule}")
        self.table = nn.Embedding(len(class_names) + 1, tokens_per_class * token_dim)

    @property
    def null_label(self) -> int:
        """Label of the null class: the number of classes."""
        return len(self.config.class_names)

    def labels_of(self, classes: str | int | Iterable[str | int]) -> list[int]:
        """Convert classes, given by name or number, one or several, to labels.

        Raises ValueError for an unknown class, with the known ones.
        """
        names = list(self.config.class_names)
        labels = []
        for entry in [classes] if isinstance(classes, (str, int)) else classes:
            text = str(int(entry) if isinstance(entry, torch.Tensor) else entry).strip()
            if text in names:
                labels.append(names.index(text))
            elif text.isdigit() and int(text) < len(names):
                labels.append(int(text))
            else:
                known = ", ".join(f"{name} ({label})" for label, name in enumerate(names))
                raise ValueError(f"unknown class {text!r}; the model's classes are {known}")
        return labels

    @torch.no_grad()
    def with_classes(self, class_names: Sequence[str]) -> ClassEmbedding:
        """Copy the embedding to these classes, in this order, followed by those of its own that are missing.

        Classes are matched by name and keep their tokens, and so does the null class; a new class starts
        with the tokens of the null class, which represent any image.
        """
        known = list(self.config.class_names)
        names = [*class_names, *(name for name in known if name not in class_names)]
        grown = ClassEmbedding(names, self.config.token_dim, self.config.tokens_per_class)
        rows = [known.index(name) if name in known else self.null_label for name in names]
        grown.table.weight.copy_(self.table.weight[[*rows, self.null_label]])
        return grown.to(self.device)

    def forward(
        self, labels: torch.Tensor, return_dict: bool = True
    ) -> ClassEmbeddingOutput | tuple[torch.Tensor]:
        """Map labels (B,), integers in [0, null_label], to tokens (B, tokens_per_class, token_dim).

        Returns:
            `ClassEmbeddingOutput` with `.tokens`, or a tuple with them when `return_dict` is False.
        """
        tokens = self.table(labels).unflatten(-1, (self.config.tokens_per_class, self.config.token_dim))
        return ClassEmbeddingOutput(tokens=tokens) if return_dict else (tokens,)
