"""LoRA under the keys of kohya's sd-scripts, as ComfyUI, A1111 and their like read them.

One module's adapters are `<name>.lora_down.weight`, `<name>.lora_up.weight` and `<name>.alpha`,
with dots in the module's name written as underscores; the scale is alpha / rank.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from craftune.errors import UserError
from craftune.exporting.ldm import unet_module

_KEY = re.compile(r"unet\.(?P<module>.+?)\.lora(?:\.(?P<old>down|up)|_(?P<new>A|B))\.weight")
_PART = {"A": "lora_down", "B": "lora_up", "down": "lora_down", "up": "lora_up"}


def to_kohya(
    layers: Mapping[str, Tensor], alpha: float, unet: Mapping[str, Any], family: str
) -> dict[str, Tensor]:
    """diffusers' LoRA keys as kohya's.

    SDXL's modules go by their names in the LDM layout ("input_blocks_4_1_..."), which kohya
    trains it in; SD1.x and SD2.x keep diffusers' names ("down_blocks_0_attentions_0_...").

    Args:
        alpha: of every adapter.
        unet: the UNet's config.json.

    Raises:
        UserError: an adapter of another kind, e.g. DoRA's magnitudes.
    """
    found: dict[str, Tensor] = {}
    for key, weight in layers.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{key}: kohya's format has no such adapter; use --to lora")
        module = match["module"]
        if family == "sdxl":
            module = unet_module(module, unet)
        name = "lora_unet_" + module.replace(".", "_")
        found[f"{name}.{_PART[match['old'] or match['new']]}.weight"] = weight.contiguous()
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found
