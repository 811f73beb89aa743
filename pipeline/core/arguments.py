"""Which arguments of a network may come from a configuration, and which from a checkpoint file.

timm hands on to a network's constructor whatever it does not take itself. What it takes itself can
fetch an address, or read a file that then runs code, or make something else than a classifier. Such
names are reserved, wherever they come from. A checkpoint is somebody else's file: of its metadata,
only arguments that are known to be harmless reach a constructor, with values of a checked type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_LOADS = "weights come from the checkpoint alone"
_OTHER_FORM = "it makes something else than a classifier"
_INTERNAL = "timm uses it itself, and no network takes it"

RESERVED = {
    "checkpoint_path": _LOADS,
    "cache_dir": _LOADS,
    "pruned": _LOADS,
    "features_only": _OTHER_FORM,
    "feature_cfg": _OTHER_FORM,
    "feature_cls": _OTHER_FORM,
    "out_indices": _OTHER_FORM,
    "name": _INTERNAL,
    "model_name": _INTERNAL,
    "model_cls": _INTERNAL,
    "model_cfg": _INTERNAL,
    "variant": _INTERNAL,
    "kwargs_filter": _INTERNAL,
    "scriptable": _INTERNAL,
    "exportable": _INTERNAL,
    "no_jit": _INTERNAL,
}
"""Arguments that are no network's, and why; all whose names begin with "pretrained" are, too."""


def why_reserved(name: str) -> str | None:
    """Why an argument is never handed on; None if it may be."""
    return _LOADS if name.startswith("pretrained") else RESERVED.get(name)


def first_reserved(names: Iterable[str]) -> str | None:
    """What is wrong with the first reserved name; None if none is."""
    for name in names:
        if why := why_reserved(name):
            return f"{name} cannot be an argument of the network: {why}"
    return None


_LARGEST = 1 << 20
_MOST_LAYERS = 1000
_COUNTED = ("depth", "layers", "blocks")
_WORD = re.compile(r"[A-Za-z0-9_]{0,40}")


def first_excessive(arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the first argument that would make a network without end.

    Args:
        arguments: By name.

    Returns:
        The problem; None if there is none.
    """
    for name, value in arguments.items():
        most = _MOST_LAYERS if any(part in name for part in _COUNTED) else _LARGEST
        if any(abs(number) > most for number in _numbers_in(value)):
            return f"{name} is at most {most}, not {str(value)[:40]}"
    return None


def _numbers_in(value: Any) -> Iterator[int | float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and abs(value) <= _LARGEST)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _is_sizes(value: Any, depth: int = 2) -> bool:
    """A number or switch, or a short list of such, or of such lists."""
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 64 and all(_is_sizes(v, depth - 1) for v in value)
    return value is None or _is_switch(value) or _is_number(value)


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "a whole number from 0 on": (
        _is_whole,
        "num_classes in_chans depth output_stride stem_size head_hidden_size num_features "
        "cardinality base_width",
    ),
    "a number": (
        _is_number,
        "drop_rate drop_path_rate proj_drop_rate attn_drop_rate pos_drop_rate patch_drop_rate "
        "drop_block_rate init_value init_values ls_init_value layer_scale_init_value "
        "head_init_scale norm_eps expand_ratio",
    ),
    "true or false": (
        _is_switch,
        "qkv_bias qk_norm class_token no_embed_class use_pos_embed use_abs_pos_emb final_norm "
        "pre_norm head_norm_first conv_bias zero_init_last avg_down dynamic_img_size "
        "dynamic_img_pad strict_img_size swiglu_mlp scale_mlp preact",
    ),
    "a word": (
        _is_word,
        "global_pool act_layer norm_layer pool_type stem_type pad_type aa_layer weight_init",
    ),
    "a number, or a list of numbers": (
        _is_sizes,
        "img_size patch_size window_size embed_dim embed_dims dims feature_dims mem_dims head_dims "
        "depths layers heads num_heads ratios mlp_ratio mlp_ratios kernel_size kernel_sizes "
        "channels widths stem_chs down_kernel_size",
    ),
}
_ALLOWED = {name: (kind, fits) for kind, (fits, names) in _KINDS.items() for name in names.split()}


def first_unknown(arguments: Mapping[Any, Any]) -> str | None:
    """What is wrong with the first argument that a file's metadata may not state.

    Args:
        arguments: By name, as the file states them.

    Returns:
        The problem; None if there is none.
    """
    for name, value in arguments.items():
        if why := first_reserved([str(name)]):
            return why
        if name not in _ALLOWED:
            return f"{name!r} is not among the arguments that a checkpoint may state"
        kind, fits = _ALLOWED[name]
        if not fits(value):
            return f"{name} must be {kind}, not {str(value)[:40]!r}"
    return None
