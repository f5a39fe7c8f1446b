"""Pictures that recipes leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure


def save_rows(path: str | Path, rows: Mapping[str, torch.Tensor], columns: int | None = None) -> None:
    """One labelled row of slices each, {title: (n, 1, H, W) in [0, 1]}; long rows wrap after `columns`."""
    columns = columns or max(len(images) for images in rows.values())
    lines = [
        (title if first == 0 else "", images[first : first + columns])
        for title, images in rows.items()
        for first in range(0, len(images), columns)
    ]
    figure = Figure(figsize=(1.2 * columns + 1.2, 1.25 * len(lines)), facecolor="black")
    axes = figure.subplots(len(lines), 1, squeeze=False)
    for axis, (title, images) in zip(axes[:, 0], lines):
        height, width = images.shape[-2:]
        strip = torch.zeros(height, width * columns)
        strip[:, : width * len(images)] = torch.cat([image[0] for image in images.float().cpu()], dim=1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="lanczos")
        axis.set_ylabel(title, color="white", rotation=0, ha="right", va="center", fontsize=11)
        axis.set(xticks=[], yticks=[])
        for edge in axis.spines.values():
            edge.set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.05)


def save_curves(csv_path: str | Path, path: str | Path) -> None:
    """One panel for each column of a metrics.csv, over the step."""
    table = pd.read_csv(csv_path).set_index("step")
    table = table.dropna(axis=1, how="all")
    figure = Figure(figsize=(3.6 * len(table.columns), 3))
    axes = figure.subplots(1, len(table.columns), squeeze=False)
    for axis, column in zip(axes[0], table.columns):
        values = table[column].dropna()
        axis.plot(values.index, values, linewidth=1.2, marker="." if len(values) < 30 else None)
        axis.set(title=column.replace("_", " "), xlabel="step")
        if column.endswith("loss") and (values > 0).all():
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def save_histograms(
    path: str | Path, panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]
) -> None:
    """One panel for each title, the histograms of the classes over each other: {class: (edges, shares)}."""
    figure = Figure(figsize=(5 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, classes) in zip(axes[0], panels.items()):
        for name, (edges, shares) in classes.items():
            axis.stairs(shares, edges, label=name, linewidth=1.4, fill=False)
        axis.set(xlabel=title, ylabel="share", ylim=(0, None))
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
