"""Quantization-aware training: a float model learns to live with integer weights and static int8 activations.

`prepare` puts trainable layers into a float model, `tune` trains them against the float model, `export_checkpoint`
writes what came out; `Student.freeze` is the same model of integer layers in memory. `tune_checkpoint` is all of it,
folder to folder.
"""

from bytelane.tune.export import export_checkpoint
from bytelane.tune.loop import (
    UNLIMITED_STEPS,
    Evaluation,
    TuneReport,
    TuneSettings,
    evaluate,
    make_optimizer,
    tune,
)
from bytelane.tune.loss import hidden_loss, logits_loss
from bytelane.tune.modules import TunedEmbedding, TunedLinear
from bytelane.tune.student import Student, WithCache, prepare
from bytelane.tune.teacher import Teacher, TuningError
from bytelane.tune.written import written_windows

__all__ = [
    "UNLIMITED_STEPS",
    "Evaluation",
    "Student",
    "Teacher",
    "TuneReport",
    "TuneSettings",
    "TunedEmbedding",
    "TunedLinear",
    "TuningError",
    "WithCache",
    "evaluate",
    "export_checkpoint",
    "hidden_loss",
    "logits_loss",
    "make_optimizer",
    "prepare",
    "tune",
    "written_windows",
]
