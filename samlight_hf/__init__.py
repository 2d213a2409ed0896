"""SAM-Lightening (arXiv 2403.09195) for Hugging Face transformers. Importing it registers the model with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    SamImageProcessor,
    SamProcessor,
)

from .modeling.configuration_sam_lightening import SamLighteningConfig, SamLighteningVisionConfig
from .modeling.modeling_sam_lightening import SamLighteningModel, SamLighteningVisionModel


__version__ = "0.1.0"

AutoConfig.register("sam_lightening", SamLighteningConfig, exist_ok=True)
AutoConfig.register("sam_lightening_vision_model", SamLighteningVisionConfig, exist_ok=True)
AutoModel.register(SamLighteningConfig, SamLighteningModel, exist_ok=True)
AutoModel.register(SamLighteningVisionConfig, SamLighteningVisionModel, exist_ok=True)
AutoModelForMaskGeneration.register(SamLighteningConfig, SamLighteningModel, exist_ok=True)
AutoProcessor.register(SamLighteningConfig, SamProcessor, exist_ok=True)
AutoImageProcessor.register(
    SamLighteningConfig, image_processor_classes={"torchvision": SamImageProcessor}, exist_ok=True
)

__all__ = ["SamLighteningConfig", "SamLighteningModel", "SamLighteningVisionConfig", "SamLighteningVisionModel"]
