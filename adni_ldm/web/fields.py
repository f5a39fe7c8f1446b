"""Input fields of app.py that depend on the model; made in the gradio block that is open."""

from collections.abc import Mapping

import gradio as gr


def sampling_fields(sampling: Mapping[str, float], max_steps: int) -> list[gr.Slider]:
    """Sliders that start at the model's own settings, as far as they are in range."""
    steps = max(2, min(sampling["num_inference_steps"], max_steps))
    scale = min(sampling["guidance_scale"], 5)
    return [
        gr.Slider(2, max_steps, steps, step=1, label="Denoising steps"),
        gr.Slider(0, 5, scale, step=0.1, label="Guidance scale (1: no guidance)"),
    ]


def seed_field() -> gr.Number:
    """The seed, of 32 bits."""
    return gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")


def condition_fields(
    conditions: Mapping[str, Mapping], label: str = "{}", empty: str = "any"
) -> list[gr.Number | gr.Dropdown]:
    """A field for each condition of a model, side by side; `conditions` as in its embedding's config.

    `label` is a field's label with {} for the name, and `empty` what a field means that is left as it is,
    with the value None or "".
    """
    if not conditions:
        return []
    with gr.Row():
        return [
            gr.Dropdown(
                [(empty, ""), *about["categories"]], value="", label=label.format(name), min_width=130
            )
            if "categories" in about
            # Without minimum and maximum: gradio's own message would name neither the condition nor the data.
            else gr.Number(
                None,
                label=label.format(name),
                info=f"{about['low']:g} to {about['high']:g}; empty: {empty}",
                min_width=130,
            )
            for name, about in conditions.items()
        ]
