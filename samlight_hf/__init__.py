"""SAM-Lightening (arXiv 2403.09195) for Hugging Face transformers. Importing it registers the model with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    SamProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from . import old_names as _old_names  # noqa: F401  registers them
from .engine.optimize import optimize
from .images.reading import ImageError
from .inference.encoded_image import EncodedImage
from .inference.mask_generation import MaskGenerationSettings, MaskGenerator
from .inference.pipelines import TASK, FastMaskGenerationPipeline
from .inference.predictor import Prediction, Predictor
from .masks.results import GeneratedMasks
from .modeling.configuration_sam_lightening import SamLighteningConfig, SamLighteningVisionConfig
from .modeling.image_processing_sam_lightening import SamLighteningImageProcessor
from .modeling.modeling_sam_lightening import SamLighteningModel, SamLighteningVisionModel


__version__ = "0.1.0"

AutoConfig.register("sam_lightening", SamLighteningConfig, exist_ok=True)
AutoConfig.register("sam_lightening_vision_model", SamLighteningVisionConfig, exist_ok=True)
AutoModel.register(SamLighteningConfig, SamLighteningModel, exist_ok=True)
AutoModel.register(SamLighteningVisionConfig, SamLighteningVisionModel, exist_ok=True)
AutoModelForMaskGeneration.register(SamLighteningConfig, SamLighteningModel, exist_ok=True)
AutoProcessor.register(SamLighteningConfig, SamProcessor, exist_ok=True)
AutoImageProcessor.register(
    SamLighteningConfig, image_processor_classes={"torchvision": SamLighteningImageProcessor}, exist_ok=True
)
if TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=FastMaskGenerationPipeline,
        pt_model=AutoModelForMaskGeneration,
        default={"model": ("facebook/sam-vit-huge", "87aecf0")},
        type="image",
    )
    # By which save_pretrained would copy the pipeline's file, and have config.json ask for it: it is this package's.
    del FastMaskGenerationPipeline._registered_impl

__all__ = [
    "EncodedImage",
    "FastMaskGenerationPipeline",
    "GeneratedMasks",
    "ImageError",
    "MaskGenerationSettings",
    "MaskGenerator",
    "Prediction",
    "Predictor",
    "SamLighteningConfig",
    "SamLighteningImageProcessor",
    "SamLighteningModel",
    "SamLighteningVisionConfig",
    "SamLighteningVisionModel",
    "optimize",
]
