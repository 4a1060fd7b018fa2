"""LoRA through peft: adapters in the denoiser, and the starting network by switching them off."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from craftune.config import LoraConfig
from craftune.diffusion import Schedule
from craftune.errors import UserError
from craftune.seeds import stream_seed
from craftune.types import Cond, Denoiser


def add_lora(network: nn.Module, config: LoraConfig, targets: tuple[str, ...], seed: int) -> None:
    """Freeze the network and put trainable adapters beside its `targets`, in place.

    The adapters are float32, whatever the network is.

    Args:
        seed: of the adapters' start: one factor is drawn, the other is 0.

    Raises:
        UserError: no module has one of these names.
    """
    import peft

    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        target_modules=list(config.targets or targets),
        init_lora_weights="gaussian",
        use_dora=config.dora,
    )
    network.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws from the global CPU generator
            torch.manual_seed(stream_seed("lora", seed))
            network.add_adapter(lora)  # type: ignore[operator]
    except ValueError as error:
        raise UserError(f"train.lora.targets: {str(error).splitlines()[0]}") from None
    for parameter in network.parameters():
        if parameter.requires_grad:  # peft makes them like the weight they stand beside
            parameter.data = parameter.data.float()


def merged(network: nn.Module) -> nn.Module:
    """A copy with the adapters added into the weights and removed."""
    whole = copy.deepcopy(network)
    whole.fuse_lora()  # type: ignore[operator]
    whole.unload_lora()  # type: ignore[operator]
    return whole


def merged_into(start: nn.Module, network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The starting network with another's adapters added into its weights, in place.

    Args:
        start: the same network without adapters, on the CPU, as exact as it is to be had: the
            frozen weights beside the adapters may have been rounded.
        network: with adapters.
        dtype: of the weights that change; sums are float32, one layer at a time.
    """
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    inject_adapter_in_model(network.peft_config["default"], start, "default")  # type: ignore[index,arg-type]
    set_peft_model_state_dict(start, get_peft_model_state_dict(network), "default")
    for layer in start.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.float()
            layer.merge()
            weight = layer.get_base_layer().get_parameter("weight")
            weight.data = weight.data.to(dtype)
    start.unload_lora()  # type: ignore[operator]
    return start


@dataclass(frozen=True)
class WithoutAdapter:
    """The policy with its adapters off: the starting network, without a second copy."""

    policy: Denoiser

    @property
    def schedule(self) -> Schedule:
        """The policy's."""
        return self.policy.schedule

    @property
    def network(self) -> nn.Module:
        """The policy's."""
        return self.policy.network

    def __call__(
        self, x_t: Float[Tensor, "b ..."], t: Num[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b ..."]:
        """The starting network's prediction, no gradient."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            with torch.no_grad():
                return self.policy(x_t, t, cond)
        finally:
            for layer in layers:
                layer.enable_adapters(True)
