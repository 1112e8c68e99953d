"""The published checkpoint layouts, and their conversion to this project's names.

The layouts were read in the published code.

| layout | keys besides timm's | here |
|---|---|---|
| timm | none; also DeiT's, EViT's (no trained parts) and this project's | unchanged |
| tnt | `alpha_heads.BLOCK` | `reduction.heads.BLOCK`; `alpha_norm`, for training only, is dropped |
| dynamicvit | `score_predictor.STAGE` | `reduction.predictors.STAGE` |
| nvit | `blocks.N.attn.qkv.Q`, …, and `dim` beside the weights | a sliced model (`nvit_layout`) |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vitpareto.search.errors import Code, UserError
from vitpareto.search.models.nvit_layout import convert_nvit
from vitpareto.search.models.weight_files import WeightsFile, some

_TIMM_KEY = re.compile(
    r"(cls_token|reg_token|dist_token|pos_embed)$"
    r"|(patch_embed|norm_pre|norm|fc_norm|attn_pool|head|head_dist)\.\w"
    r"|blocks\.\d+\.(norm1|norm2|ls1|ls2|mlp)\.\w"
    r"|blocks\.\d+\.attn\.((qkv|proj|q_norm|k_norm|norm|gate)\.(weight|bias)|widths)$"
)

#: model, and the trained parts of a token method
Converted = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """A published key layout.

    Attributes:
        name: short name.
        source: whose layout it is, for messages.
        example: a key that only this layout has, for messages.
        keys: matches the keys that it has besides timm's.
        convert: the model and the parts, under this project's names.
        method: the method of the parts; None if the keys do not tell it.
    """

    name: str
    source: str
    example: str
    keys: re.Pattern[str]
    convert: Callable[[WeightsFile], Converted]
    method: str | None = None


def convert(file: WeightsFile) -> tuple[Layout, dict[str, Tensor], dict[str, Tensor]]:
    """The layout of a file, its model's state dict, and the trained parts of a token method.

    Raises UserError for an unknown layout, with the first keys that no layout has, and for a known
    layout that lacks keys.
    """
    matching = (each for each in LAYOUTS if any(each.keys.match(key) for key in file.state))
    layout = next(matching, LAYOUTS[-1])
    unknown = [k for k in file.state if not _TIMM_KEY.match(k) and not layout.keys.match(k)]
    if unknown:
        known = "; ".join(f"{each.source}, with {each.example}" for each in LAYOUTS)
        raise UserError(
            f"weights file {file.path} has an unknown layout: no known layout has "
            f"{some(unknown)}. Known layouts: {known}",
            Code.UNSUPPORTED,
            path=str(file.path),
            keys=tuple(unknown),
            accepted=tuple(each.name for each in LAYOUTS),
        )
    model, parts = layout.convert(file)
    return layout, model, parts


def _convert_timm(file: WeightsFile) -> Converted:
    parts = {k: v for k, v in file.state.items() if k.startswith("reduction.")}
    return {k: v for k, v in file.state.items() if k not in parts}, parts


def _convert_tnt(file: WeightsFile) -> Converted:
    blocks = file.numbers(r"blocks\.(\d+)\.")
    heads = [f"{i}.{end}" for i in blocks for end in ("weight", "bias")]
    file.require("TNT's", (f"alpha_heads.{head}" for head in heads))
    parts = {f"reduction.heads.{head}": file.state[f"alpha_heads.{head}"] for head in heads}
    return {k: v for k, v in file.state.items() if not k.startswith("alpha_")}, parts


def _convert_dynamicvit(file: WeightsFile) -> Converted:
    stages = range(file.numbers(r"score_predictor\.(\d+)\.")[-1] + 1)
    layers = ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")
    names = [f"{s}.{layer}.{end}" for s in stages for layer in layers for end in ("weight", "bias")]
    file.require("DynamicViT's", (f"score_predictor.{name}" for name in names))
    parts = {f"reduction.predictors.{n}": file.state[f"score_predictor.{n}"] for n in names}
    return {k: v for k, v in file.state.items() if not k.startswith("score_predictor.")}, parts


def _convert_nvit(file: WeightsFile) -> Converted:
    timm = {key: value for key, value in file.state.items() if _TIMM_KEY.match(key)}
    return convert_nvit(file, timm), {}


LAYOUTS = (
    Layout(
        "tnt", "TNT's", "alpha_heads.0.weight",
        re.compile(r"alpha_(heads\.\d+|norm)\.(weight|bias)$"), _convert_tnt, "tnt",
    ),
    Layout(
        "dynamicvit", "DynamicViT's", "score_predictor.0.in_conv.0.weight",
        re.compile(r"score_predictor\.\d+\.(in_conv\.[01]|out_conv\.[024])\.(weight|bias)$"),
        _convert_dynamicvit, "dynamicvit",
    ),
    Layout(
        "nvit", "NViT's", "blocks.0.attn.qkv.Q.weight",
        re.compile(
            r"blocks\.\d+\.attn\.(qkv\.([QKV]\.(weight|bias)|token_mask)|proj\.proj\.(weight|bias))$"
        ),
        _convert_nvit,
    ),
    Layout(
        "timm", "timm's (also DeiT's, EViT's and this project's)", "blocks.0.attn.qkv.weight",
        re.compile(r"reduction\.\w"), _convert_timm,
    ),
)  # fmt: skip
