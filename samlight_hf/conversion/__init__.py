"""Teachers from any SAM, students created from them, averages of students, and models of another image size."""

from .averaging import average_models
from .original import SamDecoder, convert_original_checkpoint, load_decoder
from .resizing import change_image_size, resize_model, resize_processor
from .student import (
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
    "resize_model",
    "resize_processor",
    "student_config",
]
