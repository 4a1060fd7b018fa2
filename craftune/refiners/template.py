"""Rewriting without a language model: the prompt plus phrases on quality, light and framing."""

import random

QUALITY = ("highly detailed", "intricate details", "sharp focus", "crisp and clear", "high quality")
LIGHT = ("soft natural light", "golden hour light", "dramatic lighting", "bright even light")
FRAMING = ("centered composition", "balanced composition", "wide view", "close view")
FORMS = ("{p}, {q}, {l}, {f}", "{q} picture of {p}, {l}, {f}", "{p}, {f}, {l}, {q}")


def template(prompt: str, n: int, rng: random.Random) -> list[str]:
    """n distinct rewrites of any prompt; 240 exist, more than that repeat."""
    text = prompt.strip().rstrip(".,")
    made: list[str] = []
    while len(made) < n:
        choice = {"q": rng.choice(QUALITY), "l": rng.choice(LIGHT), "f": rng.choice(FRAMING)}
        rewrite = rng.choice(FORMS).format(p=text, **choice)
        if rewrite not in made or len(made) >= 240:
            made.append(rewrite)
    return made
