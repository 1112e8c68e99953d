"""The embedded model and images: what the demo, the tests and a first look run on, offline.

Images are scikit-learn's handwritten digits (real, 8x8; UCI "Optical Recognition of Handwritten
Digits"), each drawn once on a larger canvas cluttered with fragments of other *training* digits.
A digit covers about 4 of the 64 patches, so which patches a method keeps decides what is left.
The digits are split before anything is drawn: no source digit serves two splits.

The model is a plain timm VisionTransformer, small enough to ship; `_Trainee` tells how its training
differs from the usual. `vitpareto train-demo --out FILE` repeats the one that made the shipped
weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitpareto.methods.engine.errors import nearest
from vitpareto.search.errors import UserError
from vitpareto.search.training.loop import Epoch, fit

NAME = "digits"
CLASSES = tuple("0123456789")
#: Source digits per split, in the order in which they are dealt.
SPLITS = {"train": 797, "calibration": 200, "search": 400, "held-out": 400}
#: Canvas and patch side, in pixels.
SIZE, PATCH = 64, 8
EPOCHS = 70

_SPLIT_SEED = 2024
_MEAN, _STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)
_WIDTH, _DEPTH, _HEADS, _MLP_RATIO = 64, 12, 4, 2.0
_FRAGMENTS = 6
#: Side of the square of pixels one stamp may touch: a whole digit, a 4x4 fragment of one.
_DIGIT_WINDOW, _FRAGMENT_WINDOW = 22, 14
_RAMP = 0.2  # the share of training over which positions and clutter grow to their full range
_BATCH = 64

Floats = NDArray[np.float32]


@functools.cache
def _sources() -> tuple[Floats, NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """All digits [1797, 8, 8] in 0..1, their labels, and each split's indices into them.

    Every class is spread evenly, in random order, over one sequence, from which the splits are
    consecutive runs: each split, and each prefix of a split, is stratified.
    """
    from sklearn.datasets import load_digits  # slow to import, and only drawing needs it

    data = load_digits()
    labels = data.target.astype(np.int64)
    rng = np.random.default_rng(_SPLIT_SEED)
    place = np.empty(len(labels))
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    runs = np.split(np.argsort(place), np.cumsum(list(SPLITS.values()))[:-1])
    return (data.images / 16).astype(np.float32), labels, dict(zip(SPLITS, runs, strict=True))


def source_digits(split: str) -> NDArray[np.int64]:
    """Which of scikit-learn's 1,797 digits a split draws, in its order: indices [M]."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
    return _sources()[2][split]


def _stamp(
    canvas: Floats,
    glyphs: Floats,
    centre: NDArray[np.float64],
    window: int,
    scale: NDArray[np.float64],
    angle: NDArray[np.float64],
    shear: NDArray[np.float64],
    colour: NDArray[np.float64],
) -> None:
    """Draw one glyph [8, 8] on each canvas [S, S, 3], in place, where it is brighter.

    `centre` [2, M] in canvas pixels (y, x), `scale` in canvas pixels per source pixel, `angle`
    in radians, `shear` in source columns per row, `colour` [M, 3] in 0..1. Bilinear.
    """
    corner = np.floor(centre).astype(np.int64) - window // 2
    steps = np.arange(window)
    dy, dx = (corner - centre)[..., None] + steps
    cos, sin = ((f(angle) / scale)[:, None, None] for f in (np.cos, np.sin))
    row = (cos * dy[:, :, None] + sin * dx[:, None, :]).astype(np.float32)
    column = (cos * dx[:, None, :] - sin * dy[:, :, None]).astype(np.float32)
    column += shear.astype(np.float32)[:, None, None] * row
    # A black rim of one source pixel, so that what lies outside the glyph reads 0.
    row, column = np.clip(row + 4.5, 0, 8.999), np.clip(column + 4.5, 0, 8.999)
    top, left = row.astype(np.int32), column.astype(np.int32)
    row, column = row - top.astype(np.float32), column - left.astype(np.float32)
    flat = np.pad(glyphs, ((0, 0), (1, 1), (1, 1))).reshape(-1)
    at = 100 * np.arange(len(glyphs), dtype=np.int32)[:, None, None] + 10 * top + left
    value = (flat[at] * (1 - row) + flat[at + 10] * row) * (1 - column)
    value += (flat[at + 1] * (1 - row) + flat[at + 11] * row) * column
    y, x = corner[..., None] + steps
    where = np.arange(len(glyphs))[:, None, None], y[:, :, None], x[:, None, :]
    ink = value[..., None] * colour.astype(np.float32)[:, None, None, :]
    canvas[where] = np.maximum(canvas[where], ink)


def _paint(
    split: str, epoch: int, difficulty: float
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One drawing [M, S, S, 3] of every digit of a split, and where: its first patch (y, x) [2, M].

    At `difficulty` 1 a digit stands anywhere; below, it stays nearer the middle and the clutter
    is fainter (a start for training only: `draw` always asks for 1).
    """
    glyphs, _, splits = _sources()
    digits = splits[split]
    m = len(digits)
    rng = np.random.default_rng([_SPLIT_SEED, list(SPLITS).index(split), epoch])
    uniform = rng.uniform
    pad = _DIGIT_WINDOW
    canvas = np.zeros((m, SIZE + 2 * pad, SIZE + 2 * pad, 3), dtype=np.float32)

    def colour(low: float, high: float) -> NDArray[np.float64]:
        return uniform(low, high, (m, 1)) * uniform(0.6, 1, (m, 3))

    # A digit sits on a block of 2x2 patches, give or take a pixel.
    corner = 3 + np.clip(np.round(uniform(-3.5, 3.5, (2, m)) * difficulty), -3, 3).astype(np.int64)
    centre = PATCH * (corner + 1) + uniform(-1, 1, (2, m))
    for _ in range(_FRAGMENTS):
        fragment = np.zeros((m, 8, 8), dtype=np.float32)
        y, x = rng.integers(0, 5, (2, m, 1)) + np.arange(4)
        origin = rng.choice(splits["train"], m)[:, None, None]
        fragment[:, 2:6, 2:6] = glyphs[origin, y[:, :, None], x[:, None, :]]
        spot = uniform(0, SIZE, (2, m))
        for _ in range(12):  # away from the digit, as far as a few tries go
            near = ((spot - centre) ** 2).sum(0) < 15**2
            spot[:, near] = uniform(0, SIZE, (2, int(near.sum())))
        scale, angle, shear = uniform(1.7, 2.1, m), uniform(0, 2 * np.pi, m), uniform(-0.2, 0.2, m)
        ink = difficulty * colour(0.3, 0.65)
        _stamp(canvas, fragment, spot + pad, _FRAGMENT_WINDOW, scale, angle, shear, ink)
    # Training digits vary more: slant, and stroke width by a power of the ink.
    wide, shape = (2, uniform(0.6, 1.5, (m, 1, 1))) if split == "train" else (1, np.ones(1))
    scale, angle, shear = uniform(1.75, 2.1, m), *(wide * uniform(-1, 1, (2, m)) * [[0.15], [0.1]])
    ink = colour(0.75, 1)
    digit = (glyphs[digits] ** shape).astype(np.float32)
    _stamp(canvas, digit, centre + pad, _DIGIT_WINDOW, scale, angle, shear, ink)
    base = uniform(0, 0.15, (m, 1, 1, 3)).astype(np.float32)
    image = base + (1 - base) * canvas[:, pad:-pad, pad:-pad]
    image += 0.05 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), corner


def draw(split: str, epoch: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A split's images, uint8 [M, 64, 64, 3], and labels, int64 [M]; the same at every call.

    Images come shuffled and class-stratified: every prefix is nearly balanced. Training digits
    are drawn afresh for every `epoch`; the other splits have one drawing, epoch 0.

    Raises UserError for an unknown split (naming the nearest), a negative epoch, or an epoch
    other than 0 outside training.
    """
    digits = source_digits(split)
    if epoch < 0:
        raise UserError(f"an epoch cannot be negative but got {epoch}")
    if epoch and split != "train":
        raise UserError(f"split {split!r} has one drawing, epoch 0, but epoch {epoch} was asked")
    return _paint(split, epoch, 1.0)[0], _sources()[1][digits]


def build(pretrained: bool = True) -> VisionTransformer:
    """The embedded model, in eval mode: 12 blocks, class token, 64 patches, 10 classes.

    Its `pretrained_cfg` gives `timm.data.resolve_model_data_config` its input size, mean and
    standard deviation. `pretrained=False` leaves fresh weights, from torch's global seed.
    """
    model = VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        num_classes=len(CLASSES),
        embed_dim=_WIDTH,
        depth=_DEPTH,
        num_heads=_HEADS,
        mlp_ratio=_MLP_RATIO,
    )
    described: Any = {
        "architecture": NAME,
        "input_size": (3, SIZE, SIZE),
        "num_classes": len(CLASSES),
        "mean": _MEAN,
        "std": _STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    model.pretrained_cfg = model.default_cfg = described
    if pretrained:
        stored = (
            files("vitpareto.search.data")
            .joinpath("weights", "digits_vit.safetensors")
            .read_bytes()
        )
        model.load_state_dict(safetensors.torch.load(stored))
    return model.eval()


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """Images as `draw` gives them to the model's input, float32 [M, 3, S, S]."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


class _Trainee(nn.Module):
    """The model as it is trained: two devices that are gone afterwards.

    Dropping patches late, even at random, costs nothing once the class token, or any patch that
    is left, knows the answer: with class tokens alone shuffled, and larger digits, random kept
    94.0 % of 200 search images at half the MACs, TopK 97.0. So class tokens and the background are
    shuffled among a batch's images after block 6 or 7 (where a digit was drawn is known): what
    they gathered until then says nothing about the label, which must be read from the digit's own
    patches. Linear heads on the class token after blocks 2, 4 and 6 (deep supervision) keep it
    looking at the digit meanwhile. No patch is dropped or merged in training.
    """

    EARLY, SHUFFLE = (2, 4, 6), (6, 7)

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, len(CLASSES))) for _ in self.EARLY
        )

    def forward(self, images: Tensor, corner: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, 10] of images [B, 3, S, S], and those of the early heads.

        `corner` [B, 2] is the first patch (y, x) of each digit's 2x2 patches.
        """
        vit = self.vit
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        shuffle = self.SHUFFLE[int(torch.randint(len(self.SHUFFLE), ()))]
        early: list[Tensor] = []
        for index, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if index in self.EARLY:
                early.append(self.heads[len(early)](tokens[:, 0]))
            if index == shuffle:
                other = torch.randperm(len(tokens))
                keep = _digit_tokens(corner) | _digit_tokens(corner[other])
                tokens = torch.where(keep[..., None], tokens, tokens[other])
        return vit.forward_head(vit.norm(tokens)), early


def _digit_tokens(corner: Tensor) -> Tensor:
    """Which tokens, class token first, a digit lies on: bool [B, 1 + patches]."""
    offset = torch.arange(SIZE // PATCH) - corner[..., None]
    inside = (offset == 0) | (offset == 1)
    return F.pad((inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1), (1, 0))


def _initialise(vit: VisionTransformer) -> None:
    """Fresh weights at a scale that suits 64 channels (timm's 0.02 suits 768: it learns late)."""
    with torch.no_grad():
        grid = SIZE // PATCH
        assert vit.pos_embed is not None
        vit.pos_embed[0, 1:] = 0.3 * build_sincos2d_pos_embed([grid, grid], _WIDTH)
        for block in vit.blocks:
            for name, weight in block.named_parameters():
                if weight.ndim == 2:
                    nn.init.xavier_uniform_(weight)
                    if "proj" in name or "fc2" in name:
                        weight.div_(math.sqrt(2 * _DEPTH))


def _objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    labels, corner = targets[:, 0], targets[:, 1:]
    logits, early = model(images, corner)
    loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
    return loss + 0.3 * torch.stack([F.cross_entropy(e, labels) for e in early]).sum()


def top1(model: nn.Module, split: str) -> float:
    """Top-1 accuracy of a model on a split, in percent."""
    images, labels = draw(split)
    with torch.inference_mode():
        guesses = [model(batch).argmax(1) for batch in normalise(images).split(100)]
    return 100 * float((torch.cat(guesses).numpy() == labels).mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(
    out: Path, epochs: int = EPOCHS, seed: int = 0, progress: Callable[[Epoch], None] | None = None
) -> dict[str, Any]:
    """Train the model from scratch and write its weights to `out` (safetensors, float32).

    The same seed gives the same weights, bit for bit, on one kind of processor with one torch
    build: training runs on one thread (5 to 10 minutes) so that no sum depends on how many there
    are. The seed decides weights, order and shuffling; drawings are always the same. Positions and
    clutter grow to their full range over the first fifth of training; after that every epoch
    sees `draw("train", epoch)`. Returns the settings and top-1 in percent on calibration, search
    and held-out; none of the three had a part in training.

    Raises what `fit` raises.
    """
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = build(pretrained=False)
        _initialise(vit)
        labels = torch.from_numpy(_sources()[1][source_digits("train")])

        def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
            images, corner = _paint("train", epoch, min(1.0, epoch / (_RAMP * epochs)))
            inputs = normalise(images)
            targets = torch.cat([labels[:, None], torch.from_numpy(corner).T], dim=1)
            order = torch.randperm(len(labels)).split(_BATCH)
            return [(inputs[i], targets[i]) for i in order if len(i) == _BATCH]

        history = fit(
            _Trainee(vit),
            batches,
            epochs=epochs,
            lr=3e-3,
            optimizer="nmuon",
            objective=_objective,
            warmup_epochs=min(5, epochs / 10),
            progress=progress,
        )
    vit.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(safetensors.torch.save(vit.state_dict()))
    result: dict[str, Any] = {"epochs": epochs, "seed": seed, "loss": history[-1].loss}
    return result | {f"{split}_top1": top1(vit, split) for split in SPLITS if split != "train"}
