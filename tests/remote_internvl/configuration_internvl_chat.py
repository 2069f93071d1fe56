"""The configuration of a tiny model in OpenGVLab's layout, as stored with a checkpoint. The code is ours."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2Config


class InternVisionConfig(PretrainedConfig):
    """The configuration of the vision model."""

    model_type = "intern_vit_6b"

    def __init__(
        self,
        hidden_size: int = 16,
        intermediate_size: int = 24,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        num_channels: int = 3,
        image_size: int = 28,
        patch_size: int = 7,
        layer_norm_eps: float = 1e-6,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.layer_norm_eps = layer_norm_eps


class InternVLChatConfig(PretrainedConfig):
    """The configurations of both models, the tiling of images and the conversation template."""

    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        select_layer: int = -1,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        template: str | None = "tiny",
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        ps_version: str = "v2",
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.template = template
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.ps_version = ps_version
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        # The output head belongs to the language model, so its config decides whether the head is tied.
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings
