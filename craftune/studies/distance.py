"""How far a set of pictures is from another: the Frechet distance of an encoder's features.

As FID (Heusel et al. 2017, arXiv:1706.08500), but with the image towers that ship with craftune
instead of Inception: 128 numbers per picture, trained on this world. It is not FID, and its
values compare with each other alone: at equal numbers of pictures.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def frechet(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), >= 0."""
    (mean_1, cov_1), (mean_2, cov_2) = _moments(first), _moments(second)
    root = _root(cov_1)
    cross = np.linalg.eigvalsh(root @ cov_2 @ root).clip(min=0)
    gap = np.square(mean_1 - mean_2).sum()
    return float(gap + np.trace(cov_1) + np.trace(cov_2) - 2 * np.sqrt(cross).sum())


def _moments(x: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    return x.mean(0), np.cov(x, rowvar=False)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


@torch.no_grad()
def features(tower: str, images: Float[Tensor, "n 3 64 64"]) -> Float[np.ndarray, "n 128"]:
    """Image embeddings of tower "h" or "p": unit vectors."""
    from craftune.shapes.towers import DualTower, load_tower

    network, _ = load_tower(tower)
    if not isinstance(network, DualTower):
        raise ValueError(f"tower {tower!r} has no embedding of pictures alone; use 'h' or 'p'")
    return torch.cat([network.embed_images(part) for part in images.split(100)]).numpy()
