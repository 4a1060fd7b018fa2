"""One call of a network on torch's meta device: its FLOPs, and the bytes that live meanwhile."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Measured:
    """One call: its FLOPs, the most bytes alive at once, those alive at its end, its side."""

    flops: int
    peak: int
    kept: int
    side: int


def measure(network: nn.Module, call: Callable[[], Any], gradient: bool) -> Measured:
    """Count a call on the meta device; weights count nothing."""
    alive = _Alive([*network.parameters(), *network.buffers()])
    counter = FlopCounterMode(display=False)
    flash = mock.patch.object(nn.functional, "scaled_dot_product_attention", _flash)
    with torch.set_grad_enabled(gradient), flash, counter, alive:
        out = call()
        first = next(t for t in tree_leaves(tuple(out.values())) if isinstance(t, Tensor))
        return Measured(counter.get_total_flops(), alive.peak, alive.now, first.shape[-1])


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    """Attention as GPUs run it: on meta torch would build the matrix of all pairs."""
    del attn_mask, dropout_p
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]


class _Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, of those made since it was entered."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and note what it made."""
        del types
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, which: int, size: int) -> None:
        self.seen.discard(which)
        self.now -= size
