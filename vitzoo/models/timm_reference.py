"""Families that timm has and that belong to the zoo's categories, listed by reference.

Nothing is registered or rewritten here: `create_model` builds timm's own class. Figures are the authors',
where a row names one; a dash elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from timm.models import list_models

from vitzoo.registry import Family, Published, register_family

_README = "authors' README"


def _reference(
    name: str,
    categories: tuple[str, ...],
    patterns: tuple[str, ...],
    paper: str,
    code: str,
    code_license: str,
    published: Mapping[str, Published] | None = None,
    exclude: tuple[str, ...] = (),
    weights_license: str = "see the tag's licence in timm's configuration",
) -> None:
    """Register timm's models that match the patterns as one family."""
    figures = published or {}
    register_family(
        Family(
            name=name,
            categories=categories,
            paper=paper,
            code=code,
            code_license=code_license,
            weights_license=weights_license,
            models={
                m: figures.get(m, Published()) for m in list_models([*patterns], exclude_filters=[*exclude])
            },
            origin="timm",
        )
    )


def _figures(
    gmacs: Mapping[str, float], top1: Mapping[str, float] | None = None, source: str = _README
) -> dict[str, Published]:
    top1 = top1 or {}
    return {
        name: Published(gmacs=gmacs.get(name), top1=top1.get(name), source=source)
        for name in dict.fromkeys([*gmacs, *top1])
    }


_reference(
    "efficientvit_msra",
    ("hierarchical", "convolutional"),
    ("efficientvit_m*",),
    "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, CVPR 2023, arXiv 2305.07027",
    "https://github.com/microsoft/Cream/tree/main/EfficientViT",
    "MIT",
    _figures(
        {
            "efficientvit_m0": 0.079,
            "efficientvit_m1": 0.167,
            "efficientvit_m2": 0.201,
            "efficientvit_m3": 0.263,
            "efficientvit_m4": 0.299,
            "efficientvit_m5": 0.522,
        },
        {
            "efficientvit_m0": 63.2,
            "efficientvit_m1": 68.4,
            "efficientvit_m2": 70.8,
            "efficientvit_m3": 73.4,
            "efficientvit_m4": 74.3,
            "efficientvit_m5": 77.1,
        },
    ),
)
_reference(
    "efficientvit_mit",
    ("hierarchical", "convolutional"),
    ("efficientvit_b*", "efficientvit_l*"),
    "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction, ICCV 2023, arXiv 2205.14756",
    "https://github.com/mit-han-lab/efficientvit",
    "Apache-2.0",
)
_reference(
    "nextvit",
    ("hierarchical", "convolutional"),
    ("nextvit_*",),
    "Next-ViT: Next Generation Vision Transformer for Efficient Deployment, 2022, arXiv 2207.05501",
    "https://github.com/bytedance/Next-ViT",
    "Apache-2.0",
    _figures(
        {"nextvit_small": 5.8, "nextvit_base": 8.3, "nextvit_large": 10.8},
        {"nextvit_small": 82.5, "nextvit_base": 83.2, "nextvit_large": 83.6},
    ),
)
_reference(
    "vitamin",
    ("hierarchical", "convolutional"),
    ("vitamin_*",),
    "ViTamin: Designing Scalable Vision Models in the Vision-Language Era, CVPR 2024, arXiv 2404.02132",
    "https://github.com/Beckschen/ViTamin",
    "Apache-2.0",
    _figures({"vitamin_large_224": 72.6, "vitamin_large_256": 94.8, "vitamin_large_336": 163.4}),
)
_reference(
    "convnext",
    ("hierarchical", "convolutional"),
    ("convnext_*", "convnextv2_*"),
    "A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545; ConvNeXt V2, CVPR 2023, arXiv 2301.00808",
    "https://github.com/facebookresearch/ConvNeXt",
    "MIT",
    _figures(
        {},
        {"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8, "convnext_large": 84.3},
        "authors' README, trained on ImageNet-1k at 224 pixels",
    ),
)
_reference(
    "twins",
    ("hierarchical",),
    ("twins_*",),
    "Twins: Revisiting the Design of Spatial Attention in Vision Transformers, NeurIPS 2021, arXiv 2104.13840",
    "https://github.com/Meituan-AutoML/Twins",
    "Apache-2.0",
    _figures(
        {},
        {
            "twins_pcpvt_small": 81.2,
            "twins_pcpvt_base": 82.7,
            "twins_pcpvt_large": 83.1,
            "twins_svt_small": 81.7,
            "twins_svt_base": 83.2,
            "twins_svt_large": 83.7,
        },
    ),
    exclude=("twins_*_poly",),
)
_reference(
    "swin",
    ("hierarchical",),
    ("swin_*", "swinv2_*"),
    "Swin Transformer, ICCV 2021, arXiv 2103.14030; Swin Transformer V2, CVPR 2022, arXiv 2111.09883",
    "https://github.com/microsoft/Swin-Transformer",
    "MIT",
    _figures(
        {"swin_tiny_patch4_window7_224": 4.5},
        {
            "swin_tiny_patch4_window7_224": 81.2,
            "swin_small_patch4_window7_224": 83.2,
            "swin_base_patch4_window7_224": 83.5,
        },
        "authors' README, trained on ImageNet-1k",
    ),
)
_reference(
    "pvt_v2",
    ("hierarchical",),
    ("pvt_v2_*",),
    "PVT v2: Improved Baselines with Pyramid Vision Transformer, CVM 2022, arXiv 2106.13797",
    "https://github.com/whai362/PVT",
    "Apache-2.0",
    _figures(
        {},
        {
            "pvt_v2_b0": 70.5,
            "pvt_v2_b1": 78.7,
            "pvt_v2_b2": 82.0,
            "pvt_v2_b2_li": 82.1,
            "pvt_v2_b3": 83.1,
            "pvt_v2_b4": 83.6,
            "pvt_v2_b5": 83.8,
        },
    ),
)
# no pruning of its own: the unpruned baseline that token-pruning models start from and are compared with
_reference(
    "deit",
    ("token-pruning",),
    ("deit_tiny_patch*", "deit_small_patch*", "deit_base_patch*"),
    "Training data-efficient image transformers, ICML 2021, arXiv 2012.12877",
    "https://github.com/facebookresearch/deit",
    "Apache-2.0",
    _figures(
        {"deit_tiny_patch16_224": 1.26, "deit_small_patch16_224": 4.61, "deit_base_patch16_224": 17.58},
        {
            "deit_tiny_patch16_224": 72.2,
            "deit_small_patch16_224": 79.9,
            "deit_base_patch16_224": 81.8,
            "deit_base_patch16_384": 82.9,
        },
        "GMACs: timm's benchmark table; top-1: authors' README",
    ),
)
_reference(
    "mobilenetv3",
    ("convolutional",),
    ("mobilenetv3_*",),
    "Searching for MobileNetV3, ICCV 2019, arXiv 1905.02244",
    "https://github.com/tensorflow/models/tree/master/research/slim/nets/mobilenet",
    "Apache-2.0",
    _figures(
        {},
        {
            "mobilenetv3_large_075": 73.3,
            "mobilenetv3_large_100": 75.2,
            "mobilenetv3_small_075": 65.4,
            "mobilenetv3_small_100": 67.5,
        },
    ),
)
_reference(
    "mobilevit",
    ("hierarchical", "convolutional"),
    ("mobilevit_*", "mobilevitv2_*"),
    "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer, ICLR 2022, arXiv 2110.02178; "
    "Separable Self-attention for Mobile Vision Transformers (MobileViTv2), TMLR 2023, arXiv 2206.02680",
    "https://github.com/apple/ml-cvnets",
    "Apple sample code licence",
)
_reference(
    "fastvit",
    ("hierarchical", "convolutional"),
    ("fastvit_*",),
    "FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization, ICCV 2023, arXiv 2303.14189",
    "https://github.com/apple/ml-fastvit",
    "Apple sample code licence",
)
_reference(
    "mambaout",
    ("hierarchical", "convolutional"),
    ("mambaout_*",),
    "MambaOut: Do We Really Need Mamba for Vision?, CVPR 2025, arXiv 2405.07992",
    "https://github.com/yuweihao/MambaOut",
    "Apache-2.0",
)
_reference(
    "efficientvim",
    ("hierarchical", "scan"),
    ("efficientvim_*",),
    "EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality, CVPR 2025, "
    "arXiv 2411.15241",
    "https://github.com/mlvlab/EfficientViM",
    "MIT",
)
