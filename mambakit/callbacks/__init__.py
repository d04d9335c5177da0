"""What the command line adds to every fit, and what recipes add to theirs, for use in any Lightning trainer."""

from mambakit.callbacks.before_after import BeforeAfter
from mambakit.callbacks.compile import Compile
from mambakit.callbacks.confusion import ConfusionMatrix
from mambakit.callbacks.extrapolation import Extrapolation
from mambakit.callbacks.last_checkpoint import LastCheckpoint
from mambakit.callbacks.learn_words import LearnWords
from mambakit.callbacks.length_warmup import LengthWarmup
from mambakit.callbacks.loss_curve import LossCurve
from mambakit.callbacks.prediction_grid import PredictionGrid
from mambakit.callbacks.sample import Sample
from mambakit.callbacks.sample_audio import SampleAudio
from mambakit.callbacks.spectrogram import Spectrogram
from mambakit.callbacks.throughput import Throughput

__all__ = [
    "BeforeAfter",
    "Compile",
    "ConfusionMatrix",
    "Extrapolation",
    "LastCheckpoint",
    "LearnWords",
    "LengthWarmup",
    "LossCurve",
    "PredictionGrid",
    "Sample",
    "SampleAudio",
    "Spectrogram",
    "Throughput",
]
