"""The models, their construction from arguments, and their use on photographs."""

from . import threads as threads  # before torch is imported

# isort: split

from .backbone_unet import BackboneUNet, BackboneWeightsError
from .mobilenet_unet import MobileV3Unet
from .models import ARCHITECTURES, create_model, model_args_from_state_dict
from .segmenter import Segmentation, Segmenter, load_pretrained
from .unet import UNet
from .unet_paper import OverlapTileUNet, UNetPaper
from .vgg_unet import VGG16UNet

__all__ = [
    "ARCHITECTURES",
    "BackboneUNet",
    "BackboneWeightsError",
    "MobileV3Unet",
    "OverlapTileUNet",
    "Segmentation",
    "Segmenter",
    "UNet",
    "UNetPaper",
    "VGG16UNet",
    "create_model",
    "load_pretrained",
    "model_args_from_state_dict",
]
