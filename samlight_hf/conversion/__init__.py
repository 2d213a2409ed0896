"""Teachers from any SAM (original checkpoints included), students created from them, and averages of students."""

from .averaging import average_models
from .original import SamDecoder, convert_original_checkpoint, load_decoder
from .student import (
    change_image_size,
    create_student,
    evenly_spaced_layers,
    initialize_decoder,
    initialize_positions,
    load_teacher,
    student_config,
)


__all__ = [
    "SamDecoder",
    "average_models",
    "change_image_size",
    "convert_original_checkpoint",
    "create_student",
    "evenly_spaced_layers",
    "initialize_decoder",
    "initialize_positions",
    "load_decoder",
    "load_teacher",
    "student_config",
]
