"""Inverse noise correction: start a flow from the noise that its own few steps need."""

from craftune.noise.corrector import InvertedNoise as InvertedNoise
from craftune.noise.corrector import NoiseCorrection as NoiseCorrection
from craftune.noise.corrector import correct as correct
from craftune.noise.corrector import trigonometric as trigonometric
from craftune.noise.flops import call_flops as call_flops
from craftune.noise.inversion import Inversion as Inversion
from craftune.noise.inversion import invert as invert
