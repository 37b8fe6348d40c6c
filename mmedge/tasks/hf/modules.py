"""Models of transformers as plain modules: named tensors in, tensors out, nothing that depends on values."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ImageClassifier(nn.Module):
    """``pixel_values (batch, channels, height, width)`` → logits ``(batch, classes)``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The logits."""
        return self.model(pixel_values=pixel_values, return_dict=True).logits


class TextClassifier(nn.Module):
    """``input_ids`` and the like, ``(batch, length)`` → logits ``(batch, classes)``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The logits."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types, return_dict=True).logits


class DualEncoder(nn.Module):
    """CLIP: ``pixel_values``, and ``input_ids`` with its mask → two embeddings ``(batch, dim)`` of unit length."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings of images and texts."""
        image = self.model.get_image_features(pixel_values=pixel_values)
        text = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


class ImageQuestion(nn.Module):
    """ViLT for images of the size it was configured for → logits over answers ``(batch, answers)``.

    transformers' own patch embedding interpolates positions by the sizes it reads from a mask and draws patches at
    random: neither can be exported. For square images of the configured size both change nothing but the order.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, pixel_values: Tensor
    ) -> Tensor:
        """The logits."""
        embeddings = self.model.vilt.embeddings
        patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        patches = torch.cat([embeddings.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        patches = embeddings.dropout(patches + embeddings.position_embeddings)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            image_embeds=patches,
            pixel_mask=torch.ones_like(patches[..., 0], dtype=torch.long),
            return_dict=True,
        ).logits


class EncoderDecoder(nn.Module):
    """An encoder and a decoder that is given the right tokens so far (teacher forcing).

    Returns the encoder's last hidden state ``(batch, positions, dim)`` and the logits ``(batch, length, tokens)``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def answers(self, encoded: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The two outputs, from what the encoder made of its input."""
        from transformers.modeling_outputs import BaseModelOutput

        result = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=self._mask(decoder_input_ids),
            use_cache=False,
            return_dict=True,
        )
        return encoded, result.logits

    def _mask(self, tokens: Tensor) -> Tensor:
        """What hides later tokens from earlier ones; padding comes last, so that hides it as well.

        Decoders of transformers' newer kind make this mask with ``vmap``, which a traced graph cannot always run: they
        take it finished, ``(1, 1, length, length)``. Others make it themselves, of one that hides nothing.
        """
        made_with = vars(sys.modules[type(self.model.get_decoder()).__module__])
        if "create_causal_mask" not in made_with:
            return torch.ones_like(tokens)
        length = tokens.shape[1]
        return torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None, None]


class ImageToText(EncoderDecoder):
    """``EncoderDecoder`` for ``pixel_values (batch, channels, height, width)``."""

    def forward(self, pixel_values: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's state and the logits."""
        encoded = self.model.get_encoder()(pixel_values=pixel_values, return_dict=True).last_hidden_state
        return self.answers(encoded, decoder_input_ids)


class SpeechToText(EncoderDecoder):
    """``EncoderDecoder`` for ``input_features (batch, mels, frames)``."""

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's state and the logits."""
        encoded = self.model.get_encoder()(input_features, return_dict=True).last_hidden_state
        return self.answers(encoded, decoder_input_ids)
