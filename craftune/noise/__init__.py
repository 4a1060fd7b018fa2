"""Inverse noise correction: start a flow from the noise that its own few steps need."""

from craftune.methods.noise_correction import InvertedNoise as InvertedNoise
from craftune.methods.noise_correction import NoiseCorrection as NoiseCorrection
from craftune.noise.corrector import Corrected as Corrected
from craftune.noise.corrector import correct as correct
from craftune.noise.corrector import summary as summary
from craftune.noise.corrector import trigonometric as trigonometric
from craftune.noise.files import load_corrector as load_corrector
from craftune.noise.files import new_corrector as new_corrector
from craftune.noise.files import save_corrector as save_corrector
from craftune.noise.flops import call_flops as call_flops
from craftune.noise.inversion import Inversion as Inversion
from craftune.noise.inversion import invert as invert
