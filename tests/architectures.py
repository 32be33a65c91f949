"""Tiny configurations of the architectures that the library promises to handle, by name."""

import transformers as t

SIZE = 32
_WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_VIT = {"image_size": SIZE, "patch_size": 16, **_WIDTH}
_TEXT = {**_WIDTH, "num_hidden_layers": 1, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_HIERA = {
    "image_size": [SIZE, SIZE],
    "patch_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "query_stride": [2, 2],
    "masked_unit_size": [4, 4],
    "num_query_pool": 1,
}
_MAE = {
    **_VIT,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}
_RESNET = {"embedding_size": 8, **_STAGES, "layer_type": "basic"}
_CONVNEXT3 = {"hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": SIZE}
_MOBILE = {"image_size": SIZE, "depth_multiplier": 0.1, "finegrained_output": False}
_LEVIT = {
    "image_size": SIZE,
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [1, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
_PVT = {
    "image_size": SIZE,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
_SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
_HGNET = {
    "embedding_size": 8,
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16],
    "stage_mid_channels": [8, 8],
    "stage_out_channels": [16, 24],
    "stage_num_blocks": [1, 1],
    "stage_downsample": [False, True],
    "stage_light_block": [False, True],
    "stage_kernel_size": [3, 5],
    "stage_numb_of_layers": [2, 2],
    "depths": [1, 1],
    "hidden_sizes": [16, 24],
}

CLASSIFIERS = {
    "ViT": (t.ViTForImageClassification, t.ViTConfig, _VIT),
    "DeiT": (t.DeiTForImageClassification, t.DeiTConfig, _VIT),
    "BEiT": (t.BeitForImageClassification, t.BeitConfig, _VIT),
    "Swin": (t.SwinForImageClassification, t.SwinConfig, _SWIN),
    "SwinV2": (t.Swinv2ForImageClassification, t.Swinv2Config, _SWIN),
    "Hiera": (t.HieraForImageClassification, t.HieraConfig, _HIERA),
    "ViTMSN": (t.ViTMSNForImageClassification, t.ViTMSNConfig, _VIT),
    "I-JEPA": (t.IJepaForImageClassification, t.IJepaConfig, _VIT),
    "Data2VecVision": (t.Data2VecVisionForImageClassification, t.Data2VecVisionConfig, _VIT),
    "ConvNeXt": (t.ConvNextForImageClassification, t.ConvNextConfig, {**_STAGES, "num_stages": 2}),
    "ConvNeXtV2": (t.ConvNextV2ForImageClassification, t.ConvNextV2Config, {**_STAGES, "num_stages": 2}),
    "ResNet": (t.ResNetForImageClassification, t.ResNetConfig, _RESNET),
    "DINOv2": (t.Dinov2ForImageClassification, t.Dinov2Config, {**_VIT, "mlp_ratio": 2}),
    "DINOv2-registers": (
        t.Dinov2WithRegistersForImageClassification,
        t.Dinov2WithRegistersConfig,
        {**_VIT, "mlp_ratio": 2},
    ),
    "CLIP": (t.CLIPForImageClassification, t.CLIPConfig, {"vision_config": _VIT, "text_config": _TEXT}),
    "SigLIP": (t.SiglipForImageClassification, t.SiglipConfig, {"vision_config": _VIT, "text_config": _TEXT}),
    "MobileNetV2": (t.MobileNetV2ForImageClassification, t.MobileNetV2Config, _MOBILE),
    "PVT": (t.PvtForImageClassification, t.PvtConfig, _PVT),
    "LeViT": (t.LevitForImageClassification, t.LevitConfig, _LEVIT),
    "SegFormer": (t.SegformerForImageClassification, t.SegformerConfig, _SEGFORMER),
    "HGNetV2": (t.HGNetV2ForImageClassification, t.HGNetV2Config, _HGNET),
    "RegNet": (t.RegNetForImageClassification, t.RegNetConfig, {"embedding_size": 8, **_STAGES, "groups_width": 8}),
}
"""Class, configuration class and options of models with a classification head."""

ENCODERS = {
    "DINOv3-ViT": (t.DINOv3ViTModel, t.DINOv3ViTConfig, _VIT),
    "DINOv3-ConvNeXt": (t.DINOv3ConvNextModel, t.DINOv3ConvNextConfig, _CONVNEXT3),
    "ViTMAE-pretraining": (t.ViTMAEForPreTraining, t.ViTMAEConfig, _MAE),
    "ViTMAE-encoder": (t.ViTMAEModel, t.ViTMAEConfig, _MAE),
    "CLIP-vision": (t.CLIPVisionModel, t.CLIPVisionConfig, _VIT),
    "SigLIP-vision": (t.SiglipVisionModel, t.SiglipVisionConfig, _VIT),
    "DINOv2-encoder": (t.Dinov2Model, t.Dinov2Config, {**_VIT, "mlp_ratio": 2}),
    "ViT-encoder": (t.ViTModel, t.ViTConfig, _VIT),
    "I-JEPA-encoder": (t.IJepaModel, t.IJepaConfig, _VIT),
    "ConvNeXt-encoder": (t.ConvNextModel, t.ConvNextConfig, {**_STAGES, "num_stages": 2}),
    "ResNet-encoder": (t.ResNetModel, t.ResNetConfig, _RESNET),
    "Swin-encoder": (t.SwinModel, t.SwinConfig, _SWIN),
}
"""The same for encoders without one."""


def build(name, seed=0):
    """Randomly initialised model; classifiers have three classes."""
    kind, config, options = (CLASSIFIERS | ENCODERS)[name]
    t.set_seed(seed)
    return kind(config(**options, **({"num_labels": 3} if name in CLASSIFIERS else {})))
