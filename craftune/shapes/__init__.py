"""The embedded model: a small text-to-image diffusion checkpoint and the world it was trained on.

Coloured shapes on plain backgrounds stand for the web; `world` draws them, `captions` speaks of
them, `verifier` reads them back, `rewards` scores pictures of them. `model/` is an ordinary
diffusers checkpoint: nothing outside this folder knows how it came to be.
"""
