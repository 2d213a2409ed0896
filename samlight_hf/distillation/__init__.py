"""Distillation of a SAM into a SAM-Lightening, in stages, on transformers' Trainer (arXiv 2403.09195, section 2.2)."""

from .arguments import DistillationArguments, RunArguments, parse_arguments
from .callbacks import FiniteLossCallback, MaskImageCallback, ThroughputCallback, TrainingDivergedError
from .checkpoints import CheckpointChangedError, CheckpointNotSavedError
from .demonstration import demonstrate
from .embedding_cache import CachedExamples, CacheError, EmbeddingCache, fill_cache
from .feature_teacher import FeatureTeacher
from .layer_weights import DynamicLayerWeights, LayerWeightCallback, OutputOnly, UniformLayerWeights
from .run import distill
from .stages import EncoderStage, MaskStage, match_layers
from .teacher import Teacher
from .trainer import DistillationTrainer


__all__ = [
    "CacheError",
    "CachedExamples",
    "CheckpointChangedError",
    "CheckpointNotSavedError",
    "DistillationArguments",
    "DistillationTrainer",
    "DynamicLayerWeights",
    "EmbeddingCache",
    "EncoderStage",
    "FeatureTeacher",
    "FiniteLossCallback",
    "LayerWeightCallback",
    "MaskImageCallback",
    "MaskStage",
    "OutputOnly",
    "RunArguments",
    "Teacher",
    "ThroughputCallback",
    "TrainingDivergedError",
    "UniformLayerWeights",
    "demonstrate",
    "distill",
    "fill_cache",
    "match_layers",
    "parse_arguments",
]
