"""A tiny model in OpenGVLab's layout, whose code is stored with a checkpoint. The code is ours, under their names.

Like the original, every forward pass needs `image_flags`, `generate` returns only the new tokens, and the caller must
set `img_context_token_id`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from .configuration_internvl_chat import InternVisionConfig, InternVLChatConfig
from .conversation import get_conv_template


class InternAttention(nn.Module):
    """Self-attention over all patches."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states_NPH: Tensor) -> Tensor:
        """Map hidden states [N, P, H] to hidden states [N, P, H]."""
        shape = (*states_NPH.shape[:2], 3, self.heads, -1)
        query, key, value = self.qkv(states_NPH).view(shape).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed_NPH: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return mixed_NPH


class InternMLP(nn.Module):
    """A two-layer MLP applied to each patch."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states_NPH: Tensor) -> Tensor:
        """Map hidden states [N, P, H] to hidden states [N, P, H]."""
        out_NPH: Tensor = self.fc2(functional.gelu(self.fc1(states_NPH)))
        return out_NPH


class InternVisionLayer(nn.Module):
    """A block of the vision model, with a learned scale on each branch."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.attn, self.mlp = InternAttention(config), InternMLP(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, states_NPH: Tensor) -> Tensor:
        """Map hidden states [N, P, H] to hidden states [N, P, H]."""
        states_NPH = states_NPH + self.attn(self.norm1(states_NPH)) * self.ls1
        return states_NPH + self.mlp(self.norm2(states_NPH)) * self.ls2


class InternVisionEmbeddings(nn.Module):
    """Patch embeddings with positions, after a class token."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixels [N, 3, height, width] to hidden states [N, 1 + patches, H]."""
        patches_NPH = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first_N1H = self.class_embedding.expand(len(pixel_values), 1, -1)
        return torch.cat([first_N1H, patches_NPH], dim=1) + self.position_embedding


class InternVisionEncoder(nn.Module):
    """The vision model's blocks."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InternVisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, states_NPH: Tensor) -> tuple[Tensor, ...]:
        """Return the input and the output of each block."""
        states = [states_NPH]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class InternVisionModel(PreTrainedModel):
    """A small vision transformer."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings, self.encoder = InternVisionEmbeddings(config), InternVisionEncoder(config)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """Return the hidden states of the class token and of all patches."""
        states = self.encoder(self.embeddings(pixel_values))
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)


class InternVLChatModel(PreTrainedModel):
    """A language model whose context tokens are replaced by the projected tiles of images."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        side = (config.force_image_size or config.vision_config.image_size) // config.vision_config.patch_size
        self.num_image_token = int(side**2 * config.downsample_ratio**2)
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        shuffled, hidden = config.vision_config.hidden_size * self._merged() ** 2, config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled), nn.Linear(shuffled, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.img_context_token_id: int | None = None
        self.template = config.template
        self.conv_template = get_conv_template(self.template)
        self.system_message = getattr(config, "system_message", self.conv_template.system_message)
        self.post_init()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Map tiles [N, 3, height, width] to embeddings of context tokens [N, num_image_token, H]."""
        seen = self.vision_model(pixel_values).hidden_states[self.config.select_layer][:, 1:]
        side, merged = int(seen.shape[1] ** 0.5), self._merged()
        squares = seen.view(len(seen), side // merged, merged, side // merged, merged, -1)
        features: Tensor = self.mlp1(squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2))
        return features

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Return logits over the text; a tile whose flag is 0 has no context tokens."""
        if image_flags is None:
            raise ValueError("image_flags: a 1 for every tile that the text has tokens for, else a 0")
        features = self.extract_feature(pixel_values)[image_flags.view(-1) == 1]
        output = self.language_model(
            inputs_embeds=self._embed(input_ids, features),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return CausalLMOutputWithPast(
            loss=output.loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the new tokens only: the language model gets embeddings instead of a prompt's tokens."""
        features = None if pixel_values is None else self.extract_feature(pixel_values)
        embeds = self._embed(input_ids, features)
        tokens: Tensor = self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)
        return tokens

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the input embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head of the language model."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the output head of the language model."""
        self.language_model.set_output_embeddings(new_embeddings)

    def _merged(self) -> int:
        """Return the number of patches per row, and per column, that form one token."""
        return round(1 / self.config.downsample_ratio)

    def _embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Return the embeddings of the text, with the features in place of the context tokens."""
        embeds: Tensor = self.language_model.get_input_embeddings()(input_ids)
        if features is None:
            return embeds
        if self.img_context_token_id is None:
            raise ValueError("img_context_token_id is not set")
        places = input_ids == self.img_context_token_id
        given = features.flatten(0, 1)
        if int(places.sum()) != len(given):
            raise ValueError(f"{int(places.sum())} context tokens for tiles that stand for {len(given)}")
        return embeds.masked_scatter(places.unsqueeze(-1), given.to(embeds.dtype))
