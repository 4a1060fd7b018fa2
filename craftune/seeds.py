"""Independent random streams by name: what a number depends on is spelled out in its seed."""

import hashlib

import torch


def stream_seed(*parts: object) -> int:
    """A 63-bit seed that depends on these parts and nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*parts: object) -> torch.Generator:
    """A CPU generator on its own stream."""
    return torch.Generator().manual_seed(stream_seed(*parts))
