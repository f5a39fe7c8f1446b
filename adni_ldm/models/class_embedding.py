"""The class tokens that the denoiser's cross-attention reads.

This file travels with a saved pipeline and is loaded from there where adni_ldm is not installed, so it
imports nothing of the package. diffusers finds the loading method of a custom component by looking for
its base class in the component's module: `ModelMixin` must stay a name of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class ClassEmbedding(ModelMixin, ConfigMixin):
    """Learned tokens of each class, and of one class more that stands for "no class".

    The last entry is the null class of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598):
    training replaces a tenth of the labels by it, sampling contrasts it with the class asked for.

    Args:
        class_names: names in the order of their labels; label k is `class_names[k]`.
        token_dim: width D of a token, the denoiser's `cross_attention_dim`.
        tokens_per_class: how many tokens cross-attention may choose among.
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
            raise ValueError(f"class_names={list(class_names)} names a class twice")
        if any(not name or name.startswith(".") or set(name) & set("/\\\0") for name in class_names):
            raise ValueError(f"class_names={list(class_names)}: each must be able to name a folder")
        self.table = nn.Embedding(len(class_names) + 1, tokens_per_class * token_dim)

    @property
    def null_label(self) -> int:
        """Label of the null class: one past the last real one."""
        return len(self.config.class_names)

    def labels_of(self, classes: str | int | Iterable[str | int]) -> list[int]:
        """Labels of classes given by name or number, one or several.

        Raises:
            ValueError: a class that the model does not know; the message names those it does.
        """
        names = list(self.config.class_names)
        one = isinstance(classes, (str, int))
        labels = []
        for entry in [classes] if one else classes:
            text = str(int(entry) if isinstance(entry, torch.Tensor) else entry).strip()
            if text in names:
                labels.append(names.index(text))
            elif text.isdigit() and int(text) < len(names):
                labels.append(int(text))
            else:
                known = ", ".join(f"{name} ({label})" for label, name in enumerate(names))
                raise ValueError(f"the model knows no class {text!r}; it knows {known}")
        return labels

    @torch.no_grad()
    def with_classes(self, class_names: Sequence[str]) -> ClassEmbedding:
        """A copy that knows these classes, in this order, and after them those that only this one knows.

        Classes are told by their names and keep their tokens, and so does the null class; a new class starts
        with the tokens of the null class, which stand for any image.
        """
        known = list(self.config.class_names)
        names = [*class_names, *(name for name in known if name not in class_names)]
        grown = ClassEmbedding(names, self.config.token_dim, self.config.tokens_per_class)
        rows = [known.index(name) if name in known else self.null_label for name in names]
        grown.table.weight.copy_(self.table.weight[[*rows, self.null_label]])
        return grown.to(self.device)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B,), integers in [0, null_label], to tokens (B, tokens_per_class, token_dim)."""
        return self.table(labels).unflatten(-1, (self.config.tokens_per_class, self.config.token_dim))
