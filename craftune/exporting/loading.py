"""The model card's section on how others load an export."""

from collections.abc import Mapping
from typing import Any

from craftune.exporting.trained import Trained
from craftune.models.files import loading_arguments, stitched_code

PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


def how_to_load(run: Trained, to: str, dtype: str, base_name: str) -> str:
    """The section's text: code that loads the export and draws.

    Args:
        to: the format's name.
        dtype: of the weights.
        base_name: what others call the base.
    """
    if run.stitch is not None:
        return _stitched({**run.stitch, "base": base_name})
    kind, name = PIPELINES[run.family], run.recipe.run.name
    start = "from_single_file" if run.base.is_file() else "from_pretrained"
    told = loading_arguments(run.model)
    base = f'{start}("{base_name}", dtype=torch.float16{told})'
    precision = f"dtype=torch.{dtype}{told}"
    code = {
        "diffusers": f'pipe = {kind}.from_pretrained("path/to/this/folder", {precision})',
        "single-file": f'pipe = {kind}.from_single_file("{name}.safetensors", {precision})',
        "lora": f'pipe = {kind}.{base}\npipe.load_lora_weights("path/to/this/folder")',
        "kohya": f"pipe = {kind}.{base}\n"
        f'pipe.load_lora_weights("path/to/this/folder", weight_name="{name}.safetensors")',
    }[to]
    places = {
        "single-file": "ComfyUI and A1111: put the file into `models/checkpoints` or "
        "`models/Stable-diffusion`.\n",
        "kohya": "ComfyUI: put the file into `models/loras`. A1111: into `models/Lora`, and write "
        f"`<lora:{name}:1>` in the prompt.\n",
    }
    generate = run.recipe.generate
    call = (
        f'image = pipe("a prompt", num_inference_steps={generate.num_steps}, '
        f"guidance_scale={generate.guidance_scale:g}).images[0]"
    )
    return (
        f"```python\nimport torch\nfrom diffusers import {kind}\n\n{code}\n{call}\n```\n\n"
        f"{places.get(to, '')}"
    )


def _stitched(how: Mapping[str, Any]) -> str:
    """Of a P-GRAFT run: its base finishes what it begins."""
    code = stitched_code("path/to/this/folder", how)
    return (
        f"P-GRAFT tuned the noisy part of the chain alone: these weights draw from noise down to "
        f"timestep {how['t_star']:g}, the base draws from there. Alone they draw other pictures "
        "than those that were evaluated, so load both, with craftune:\n\n"
        f"```python\nimport craftune\n\npipe = {code}\n"
        f'image = pipe("a prompt", num_inference_steps={how["num_steps"]}, '
        f"guidance_scale={how['guidance_scale']:g}).images[0]\n```\n\n"
        "t* is a timestep of this sampler in this number of steps; stitch.json has these values.\n"
    )
