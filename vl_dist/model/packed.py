"""The module that training wraps: one pack in, one summed loss out.

It calls the parts of Qwen2-VL one after the other instead of the whole forward, which keeps the frozen tower out of
autograd, needs no search for image tokens, and makes logits for target rows only.

Legend: T tokens, N targets, V image tokens, P patches, H hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from vl_dist.data.collate import Batch
from vl_dist.errors import UserError
from vl_dist.model.attention import Backend, by_image, make_kernel
from vl_dist.model.compilation import compile_layers
from vl_dist.model.last_layer import shorten_last_layer
from vl_dist.model.recompute import recompute_layers
from vl_dist.model.tower import encode_images


class PackedModel(nn.Module):
    """A PEFT-wrapped Qwen2-VL that takes packs."""

    def __init__(
        self,
        peft_model: PeftModel,
        backend: Backend,
        *,
        recompute: str = "none",
        compiled: bool = False,
        num_lengths: int | None = None,
    ) -> None:
        """
        Args:
            peft_model: its layers are changed in place as far as the following ask for it.
            backend: attention of the language model.
            recompute: `model.recompute`.
            compiled: whether layers are compiled for training (`run.compile`).
            num_lengths: how many lengths packs have at most (`batch.pack_lengths`).
        """
        super().__init__()
        self.peft_model = peft_model
        self._backend = backend
        self._kernel = make_kernel(backend)
        self.tower_trains = any(p.requires_grad for p in self.tower.parameters())
        self.keep_features: Callable[[Batch, torch.Tensor], None] | None = None  # gets what the tower made of each pack
        shorten_last_layer(self._base)
        if compiled:
            compile_layers(self._base, num_lengths)
        recompute_layers(self._base, recompute)

    @property
    def _base(self) -> Any:
        return self.peft_model.get_base_model()

    @property
    def tower(self) -> nn.Module:
        """The vision tower with its merger."""
        tower: nn.Module = self._base.model.visual
        return tower

    @property
    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their name in the PEFT model."""
        return {name: p for name, p in self.peft_model.named_parameters() if p.requires_grad}

    @property
    def base_dtype(self) -> torch.dtype:
        """Precision of the frozen weights."""
        dtype: torch.dtype = self._base.lm_head.weight.dtype
        return dtype

    @property
    def attention(self) -> Backend:
        """What computes it."""
        return self._backend

    def forward(self, batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the pack's targets: a float32 scalar; 0 with gradient 0 if there is none."""
        logits = self.target_logits(batch).float()
        return functional.cross_entropy(logits, batch.target_ids, reduction="sum")

    def target_logits(self, batch: Batch) -> torch.Tensor:
        """[N, vocabulary]: the scores that predict each target."""
        logits: torch.Tensor = self._base.lm_head(self.hidden_states(batch, batch.target_rows))
        return logits

    def hidden_states(self, batch: Batch, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The language model's last hidden states.

        Args:
            rows: [N] int64, the rows to compute; None: all.

        Returns:
            [N, H], or [T, H].
        """
        language_model = self._base.model.language_model
        embeddings = language_model.embed_tokens(batch.input_ids)
        if batch.num_images:  # an idle one counts
            # One image may stand in several places, and an idle one stands in none (`run.idle`).
            features = self.image_features(batch).index_select(0, batch.feature_rows)
            embeddings = embeddings.index_copy(0, batch.image_rows, features.to(embeddings.dtype))
        output = language_model(
            inputs_embeds=embeddings[None],
            attention_mask={"full_attention": self._kernel(batch, embeddings.dtype)},
            position_ids=batch.positions[:, None],
            use_cache=False,
            target_rows=rows,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def image_features(self, batch: Batch) -> torch.Tensor:
        """[V, H] of the pack's distinct images, those of the cache first; without a graph unless the tower trains."""
        tower, cached = self._base.model.visual, batch.cached_features
        if not batch.num_encoded_images:
            return cached
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tower_trains):
            attend = by_image(batch, self._backend)
            encoded = encode_images(tower, batch.pixel_values.to(tower.dtype), batch.patch_positions, attend)
        if self.keep_features is not None:
            self.keep_features(batch, encoded)
        return torch.cat([cached, encoded]) if batch.num_cached_images else encoded

    def encode_only(self, batch: Batch) -> None:
        """Runs the tower for `keep_features` alone."""
        with torch.no_grad(), out_of_memory_named(batch):
            self.image_features(batch)


@contextlib.contextmanager
def out_of_memory_named(pack: Batch) -> Iterator[None]:
    """Says which pack did not fit and what to lower, instead of torch's traceback.

    Raises:
        UserError: the device ran out of memory inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"The device ran out of memory in a pack of {pack.num_tokens} tokens and {pack.num_patches} patches: "
            f"{first_line} Set model.recompute=all (the same numbers, in more time), or lower batch.max_tokens_per_pack "
            "(the same examples then make more, smaller packs) or data.max_pixels."
        ) from None
