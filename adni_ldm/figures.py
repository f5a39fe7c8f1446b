"""Pictures that recipes leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from adni_ldm.pipeline import Counterfactual

GREY = {"cmap": "gray", "vmin": -1, "vmax": 1}


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


def colour_limit(result: Counterfactual) -> float:
    """The difference that gets the strongest colour; never so small that noise would look like something."""
    return max(0.05, float(result.difference.abs().max()))


def difference_picture(difference: torch.Tensor, limit: float) -> Image.Image:
    """A difference (1, H, W) in colours: blue is darker by `limit`, white is none, red is brighter by it."""
    colours = colormaps["RdBu_r"]((difference[0].float().cpu().numpy() / limit + 1) / 2, bytes=True)
    return Image.fromarray(colours[..., :3])


def save_counterfactual(path: str | Path, given: torch.Tensor, result: Counterfactual, classes: str) -> None:
    """A slice (1, H, W) in [-1, 1], what it became, and the two maps to read together, in one scale.

    Args:
        result: of that slice, a batch of one.
        classes: what the picture is called, such as "NC to AD".
    """
    panels = {"given": given, "round trip": result.round_trip[0], classes: result.images[0]}
    error = result.round_trip[0] - given.to(result.round_trip.device)
    maps = {f"{classes} − given": result.difference[0], "round trip − given": error / 2}
    limit = colour_limit(result)
    figure = Figure(figsize=(13, 3), layout="constrained")
    axes = figure.subplots(1, len(panels) + len(maps))
    for axis, (title, image) in zip(axes, (panels | maps).items()):
        options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if title in maps else GREY
        shown = axis.imshow(image[0].float().cpu(), **options)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[-1], label="share of the grey range", shrink=0.8)
    figure.savefig(path, dpi=110)


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
