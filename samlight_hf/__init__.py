"""SAM-Lightening (arXiv 2403.09195) for Hugging Face transformers: Segment Anything with dilated flash attention.

Importing the package registers its model with transformers' Auto classes and the pipeline task "fast-mask-generation".

- `Predictor`: masks for points, boxes and masks as prompts.
- `MaskGenerator`, `FastMaskGenerationPipeline`: masks of everything in an image.
- `optimize`: a whole model, fused and replayed from CUDA graphs.
- `SamLighteningModel`, `SamLighteningConfig`: the model itself.
- `samlight_hf.loading`, `.conversion`, `.hub`: loading, converting and publishing checkpoints.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    SamProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from . import old_names as _old_names  # noqa: F401  makes old imports work
from .engine.optimize import optimize
from .images.reading import ImageError
from .inference.encoded_image import EncodedImage
from .inference.mask_generation import MaskGenerationSettings, MaskGenerator
from .inference.pipelines import TASK, FastMaskGenerationPipeline
from .inference.predictor import Prediction, Predictor
from .inference.tiles import TileSettings
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
    # Without this, save_pretrained would copy the pipeline's file to the checkpoint and name it in config.json.
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
    "TileSettings",
    "optimize",
]
