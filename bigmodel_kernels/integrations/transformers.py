"""Hugging Face transformers: bmk.attention as an attention implementation of its models.

    bmk.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="bigmodel_kernels")

or, for a model that is there already, ``register(model)``. Written to the AttentionInterface of transformers 4.53 to 5.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor, nn

from bigmodel_kernels.ops.attention import attention

NAME = "bigmodel_kernels"
LEAST_VERSION = "4.53"  # the first with interfaces for both the attention and its masks
# Arguments that change what is computed and that the op does not have. Others that models hand through do not reach the formula.
_NOT_SUPPORTED = ("s_aux", "position_bias", "head_mask", "cache")


def register(model: nn.Module | None = None) -> str:
    """Makes ``attn_implementation="bigmodel_kernels"`` known to transformers, and lets `model`, if given, use it.

    The attention function and the one that makes its masks are registered together: with the first alone, masks would not
    reach it, and padding would be attended to.

    Args:
        model: a transformers model, switched over in place.

    Returns:
        The name to pass as ``attn_implementation``.

    Raises:
        ImportError: transformers is not installed, or too old.
        RuntimeError: the class of `model` does not take its attention from this interface.
    """
    transformers, masks = _library()
    transformers.AttentionInterface.register(NAME, attention_forward)
    masks.AttentionMaskInterface.register(NAME, masks.sdpa_mask)
    if model is not None:
        model.set_attn_implementation(NAME)
        found = getattr(model.config, "_attn_implementation", None)
        if found != NAME:
            raise RuntimeError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface and runs "
                f"{found!r} as before; bigmodel_kernels.optimize(model) replaces the torch.nn layers it is made of"
            )
    return NAME


def _library() -> tuple[ModuleType, ModuleType]:
    remedy = f"pip install 'transformers>={LEAST_VERSION}'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"transformers is not installed: {remedy}") from error
    try:
        masking_utils = importlib.import_module("transformers.masking_utils")
        for module, name in (
            (transformers, "AttentionInterface"),
            (masking_utils, "AttentionMaskInterface"),
            (masking_utils, "sdpa_mask"),
        ):
            if not hasattr(module, name):
                raise ImportError(f"{module.__name__} has no {name}")
    except ImportError as error:
        version = getattr(transformers, "__version__", "unknown")
        raise ImportError(f"transformers {version} is too old ({error}): {remedy}") from error
    return transformers, masking_utils


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, Hq, Sq, D]
    key: Tensor,  # [B, Hkv, Sk, D]: not repeated for grouped queries
    value: Tensor,  # [B, Hkv, Sk, Dv]
    attention_mask: Tensor | None,  # [B, 1 or Hq, Sq, Sk]: bool (True: attend) or added to the scores
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    output_attentions: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:  # [B, Sq, Hq, Dv] contiguous; no weights
    """What transformers calls in each attention layer.

    A mask says all there is to say. Without one, attention is causal if `is_causal`, else ``module.is_causal``, else by
    default, says so; query i then sees keys up to i (and no more than `sliding_window` of them). A single query sees every key.

    Raises:
        ValueError: an argument that changes the formula and that bmk.attention does not have.
    """
    for name in _NOT_SUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: attn_implementation={NAME!r} does not have it; use 'eager' for this model")
    if output_attentions:
        raise ValueError(f"output_attentions: attn_implementation={NAME!r} never makes the weights; use 'eager'")
    window = None
    causal = False
    alignment = "upper_left"
    if attention_mask is not None:
        if attention_mask.shape[-1] > key.shape[2]:  # caches of a fixed size come with masks of a fixed size
            attention_mask = attention_mask[..., : key.shape[2]]
    else:
        several = query.shape[2] > 1
        wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(wanted) and several
        if sliding_window is not None and wanted:
            window = (sliding_window - 1, None)
            alignment = "upper_left" if several else "lower_right"  # a single query is the newest position
    out = attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=causal,
        alignment=alignment,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
        window=window,
        softcap=softcap or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None  # stored in that order already
