"""Whose checkpoint a weights file is, and its weights under this project's names.

The key layouts were read in the published code.

| layout | its own keys | here |
|---|---|---|
| timm | none; also DeiT's, EViT's (it trains no part of its own) and this project's | unchanged |
| tnt | `alpha_heads.BLOCK` | `reduction.heads.BLOCK`; `alpha_norm`, used in training only, goes |
| dynamicvit | `score_predictor.STAGE` | `reduction.predictors.STAGE` |
| nvit | `blocks.N.attn.qkv.Q`, …, and `dim` beside the weights | a sliced model |
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitpareto.methods import Recipe
from vitpareto.methods.engine.build import Untrained
from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.weights import load_strictly
from vitpareto.methods.slicing.sliced_model import Widths, sliced_model, widths_of
from vitpareto.search.errors import UserError
from vitpareto.search.models.weight_files import WeightsFile, read_weights_file, some

_TIMM = re.compile(
    r"(cls_token|reg_token|dist_token|pos_embed)$"
    r"|(patch_embed|norm_pre|norm|fc_norm|attn_pool|head|head_dist)\.\w"
    r"|blocks\.\d+\.(norm1|norm2|ls1|ls2|mlp)\.\w"
    r"|blocks\.\d+\.attn\.((qkv|proj|q_norm|k_norm|norm|gate)\.(weight|bias)|widths)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """A weights file read.

    model: the state dict of the model itself, timm's names (a sliced one's with `attn.widths`);
    parts: `reduction.*`, what was trained of a token method, {} where nothing was; method: whose
    they are, None where the keys do not say it.
    """

    path: Path
    layout: str
    model: dict[str, Tensor]
    parts: dict[str, Tensor]
    method: str | None = None

    @property
    def widths(self) -> Widths | None:
        """The dimensions of a sliced model; None for any other."""
        return widths_of(self.model) if "blocks.0.attn.widths" in self.model else None

    def fill(self, model: nn.Module) -> nn.Module:
        """`model`, sliced as the file's is, with the file's `model` loaded, strictly.

        Raises UserError naming the file and the keys or dimensions that do not fit.
        """
        named = f"weights file {self.path}"
        try:
            widths = self.widths
            if widths is not None:
                model = sliced_model(model, widths)
        except BadInput as error:
            raise UserError(f"{named}: {error}") from error
        _load(model, self.model, named)
        return model

    def weights_for(self, recipe: Recipe, dense: nn.Module) -> dict[str, Tensor] | None:
        """The complete state dict of `recipe` built on `dense` with the file's trained parts.

        dense: the model that this file's `model` was loaded into. None where the recipe takes none
        of them: it has no token method with trained parts, they are another method's, or it names
        weights already. Raises UserError where they are its method's and do not fit its setting.
        """
        step = recipe.tokens
        if step is None or recipe.weights is not None or not self.parts:
            return None
        if self.method not in (None, step.method) or step.declared.training != "required":
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Untrained)  # it is trained in the next lines
            built = recipe.build(dense)
        own = {k: v for k, v in built.state_dict().items() if not k.startswith("reduction.")}
        fresh = {k.split(".")[1] for k in built.state_dict() if k.startswith("reduction.")}
        if fresh.isdisjoint(k.split(".")[1] for k in self.parts):
            return None
        _load(built, {**own, **self.parts}, f"weights file {self.path} for {recipe}")
        return dict(built.state_dict())


def _load(model: nn.Module, state: Mapping[str, Tensor], named: str) -> None:
    """Every weight of `model` from `state`, strictly; UserError names the file and the keys at
    fault.
    """
    try:
        load_strictly(model, state)
    except BadInput as error:
        raise UserError(f"{named}: {error}") from error


# --- the published layouts


@dataclass(frozen=True)
class _Layout:
    """`own` are the keys it has beside timm's, `mark` one of them; `convert` gives (model, parts)
    under this project's names.
    """

    name: str
    source: str
    mark: str
    own: re.Pattern[str]
    convert: Callable[[WeightsFile], tuple[dict[str, Tensor], dict[str, Tensor]]]
    method: str | None = None


def _timm(file: WeightsFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parts = {k: v for k, v in file.state.items() if k.startswith("reduction.")}
    return {k: v for k, v in file.state.items() if k not in parts}, parts


def _tnt(file: WeightsFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    blocks = file.numbers(r"blocks\.(\d+)\.")
    heads = [f"{i}.{end}" for i in blocks for end in ("weight", "bias")]
    file.require("TNT's", (f"alpha_heads.{head}" for head in heads))
    parts = {f"reduction.heads.{head}": file.state[f"alpha_heads.{head}"] for head in heads}
    return {k: v for k, v in file.state.items() if not k.startswith("alpha_")}, parts


def _dynamicvit(file: WeightsFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stages = range(file.numbers(r"score_predictor\.(\d+)\.")[-1] + 1)
    layers = ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")
    names = [f"{s}.{layer}.{end}" for s in stages for layer in layers for end in ("weight", "bias")]
    file.require("DynamicViT's", (f"score_predictor.{name}" for name in names))
    parts = {f"reduction.predictors.{n}": file.state[f"score_predictor.{n}"] for n in names}
    return {k: v for k, v in file.state.items() if not k.startswith("score_predictor.")}, parts


#: NViT's attention divides by the root of DeiT's head width, however narrow q and k have become
NVIT_SCALE = 64**-0.5


def _nvit(file: WeightsFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = {k: v for k, v in file.state.items() if _TIMM.match(k)}
    blocks = file.numbers(r"blocks\.(\d+)\.")
    for block, (heads, qk, v) in zip(blocks, _nvit_dimensions(file, len(blocks)), strict=True):
        at = f"blocks.{block}.attn."
        file.require(
            "NViT's",
            [f"{at}qkv.{x}.{end}" for x in "QKV" for end in ("weight", "bias")]
            + [f"{at}proj.proj.{end}" for end in ("weight", "bias")],
        )
        mask = file.state.get(f"{at}qkv.token_mask", torch.ones(1))
        if not bool((mask == 1).all()):
            raise UserError(
                f"weights file {file.path}: {at}qkv.token_mask weighs the tokens by their place, "
                f"by {mask.min():.3g} to {mask.max():.3g}, which no weights of a block can say: "
                "accepted is 1 for every token"
            )
        for x, rows in (("Q", heads * qk), ("K", heads * qk), ("V", heads * v)):
            shape = tuple(file.state[f"{at}qkv.{x}.weight"].shape)
            if len(shape) != 2 or shape[0] != rows:
                hint = ": it is NViT's before slicing" if len(shape) == 3 else ""
                raise UserError(
                    f"weights file {file.path}: {at}qkv.{x}.weight is {list(shape)}, and its dim "
                    f"asks for {rows} rows ({heads} heads, q and k {qk} and v {v} wide){hint}"
                )
        # here attention divides by the root of the width that there is
        fold = {"Q": NVIT_SCALE * qk**0.5, "K": 1.0, "V": 1.0}
        for end in ("weight", "bias"):
            given = [file.state[f"{at}qkv.{x}.{end}"] * factor for x, factor in fold.items()]
            state[f"{at}qkv.{end}"] = torch.cat(given)
            state[f"{at}proj.{end}"] = file.state[f"{at}proj.proj.{end}"]
        state[f"{at}widths"] = torch.tensor([heads, qk, v])
    file.require("NViT's", ["patch_embed.proj.weight"])
    state["patch_embed.proj.weight"] = _nvit_stem(file)
    return state, {}


def _nvit_dimensions(file: WeightsFile, depth: int) -> list[tuple[int, int, int]]:
    """(heads, qk, v) of each block: the weights alone do not say how many heads share them."""
    dim = file.beside.get("dim")
    keys = ("head", "QK", "V")
    lists = [dim.get(key) if isinstance(dim, Mapping) else None for key in keys]
    for key, values in zip(keys, lists, strict=True):
        listed = isinstance(values, (list, tuple)) and len(values) == depth
        if not listed or not all(isinstance(n, int) and n >= 1 for n in values or ()):
            raise UserError(
                f"weights file {file.path} is in NViT's layout: accepted is one with dim beside "
                f"the weights, and in it {', '.join(keys)}, lists of {depth} whole numbers from 1; "
                f"dim.{key} is {values!r}"
            )
    return list(zip(*(list(values or ()) for values in lists), strict=True))


def _nvit_stem(file: WeightsFile) -> Tensor:
    """[E, p * p * 3, 1, 1] over pixels row by row, channels last -> a convolution [E, 3, p, p]."""
    weight = file.state["patch_embed.proj.weight"]
    side = math.isqrt(weight.shape[1] // 3)
    if weight.dim() != 4 or weight.shape[1:] != (3 * side * side, 1, 1):
        raise UserError(
            f"weights file {file.path} is in NViT's layout: patch_embed.proj.weight is "
            f"{list(weight.shape)}, accepted is [E, 3 * side * side, 1, 1]"
        )
    return weight.reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()


LAYOUTS = (
    _Layout(
        "tnt", "TNT's", "alpha_heads.0.weight",
        re.compile(r"alpha_(heads\.\d+|norm)\.(weight|bias)$"), _tnt, "tnt",
    ),
    _Layout(
        "dynamicvit", "DynamicViT's", "score_predictor.0.in_conv.0.weight",
        re.compile(r"score_predictor\.\d+\.(in_conv\.[01]|out_conv\.[024])\.(weight|bias)$"),
        _dynamicvit, "dynamicvit",
    ),
    _Layout(
        "nvit", "NViT's", "blocks.0.attn.qkv.Q.weight",
        re.compile(
            r"blocks\.\d+\.attn\.(qkv\.([QKV]\.(weight|bias)|token_mask)|proj\.proj\.(weight|bias))$"
        ),
        _nvit,
    ),
    _Layout(
        "timm", "timm's (also DeiT's, EViT's and this project's)", "blocks.0.attn.qkv.weight",
        re.compile(r"reduction\.\w"), _timm,
    ),
)  # fmt: skip


# --- reading


def read_checkpoint(path: Path) -> Checkpoint:
    """The weights in a file, .safetensors or a weights-only .pth, under this project's names.

    Raises UserError: what `read_weights_file` raises; a layout that is not known, with the first
    keys that fit nothing; a known one that lacks keys.
    """
    file = read_weights_file(path)
    named = (layout for layout in LAYOUTS if any(layout.own.match(key) for key in file.state))
    layout = next(named, LAYOUTS[-1])
    strange = [k for k in file.state if not _TIMM.match(k) and not layout.own.match(k)]
    if strange:
        known = "; ".join(f"{each.source}, with {each.mark}" for each in LAYOUTS)
        raise UserError(
            f"weights file {path} has a layout that is not known: {some(strange)} "
            f"{'fits' if len(strange) == 1 else 'fit'} nothing. Known are: {known}"
        )
    model, parts = layout.convert(file)
    return Checkpoint(path, layout.name, model, parts, layout.method)
