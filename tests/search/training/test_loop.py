"""Training continues where it stopped, bit for bit; a state that does not fit is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.refusals import refused
from tests.search.small import vit
from vitpareto import methods
from vitpareto.search.errors import UserError
from vitpareto.search.training.checkpoints import TrainingCheckpoint
from vitpareto.search.training.loop import TrainingState, fit
from vitpareto.search.training.losses import supervised
from vitpareto.search.training.optimizers import Optimization

METHODS = {
    "dense": {},
    "patchmerger": {"prune_layers": [1], "num_tokens": 9},
    "tnt": {"prune_layers": [1], "keep_rates": [0.5]},
    "dynamicvit": {"prune_layers": [1, 2], "keep_rates": [0.6, 0.4]},
}


def small(method: str = "dense") -> nn.Module:
    """3 blocks and 64 patches, with dropout, at fresh weights from a fixed seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        dense = copy.deepcopy(vit())
        dense.blocks = dense.blocks[:3]
        for module in dense.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return methods.Recipe.of(method, **METHODS[method]).build(dense)


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Three batches that draw from torch's global generator, as a trainer's may."""
    return [(torch.randn(4, 3, 64, 64), torch.randint(10, (4,))) for _ in range(3)]


class Interrupted(Exception):
    pass


def trained(
    method: str, path: Path | None = None, stop: int | None = None, **settings
) -> nn.Module:
    """Trained for 3 epochs from torch's seed 1; killed when `stop` epochs are done."""
    model = small(method)
    store = None if path is None else TrainingCheckpoint(path, {"method": method})
    with torch.random.fork_rng([]):
        torch.manual_seed(1)

        def keep(state: TrainingState) -> None:
            if store is not None:
                store.save(state)
            if len(state.history) == stop:
                raise Interrupted

        fit(
            model,
            batches,
            Optimization(**{"epochs": 3, "lr": 1e-3, "parts_scale": 10.0, **settings}),
            objective=supervised(),
            state=None if store is None else store.load(model),
            on_state=keep,
        )
    return model


pytestmark = pytest.mark.filterwarnings("ignore::vitpareto.methods.Untrained")


@pytest.mark.parametrize(
    "method, settings",
    [
        *((name, {}) for name in METHODS),
        ("dense", {"average": 0.9, "layer_decay": 0.7, "warmup_epochs": 1}),
        ("tnt", {"optimizer": "nmuon", "average": 0.99}),
        # a step count beside the parameters' own state, as a number and as a tensor
        ("dense", {"optimizer": "adan"}),
        ("dense", {"optimizer": "lamb"}),
    ],
    ids=str,
)
def test_an_interrupted_training_ends_with_the_same_weights(method, settings, tmp_path) -> None:
    whole = trained(method, **settings)
    path = tmp_path / "deep" / "state.pt"
    for done in (1, 2):
        with pytest.raises(Interrupted):
            trained(method, path, stop=done, **settings)
    again = trained(method, path, **settings)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    before = small(method).state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in whole.state_dict().items())
    # and once more: there is nothing left to do
    for (name, a), b in zip(
        whole.state_dict().items(),
        trained(method, path, **settings).state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "state.pt"
    with pytest.raises(Interrupted):
        trained("dense", path, stop=1)
    return path


def refuses(
    path: Path,
    code: str,
    keys: list[str] | None = None,
    model: nn.Module | None = None,
    **settings: object,
) -> None:
    """The checkpoint is refused, and the model is left as it was."""
    model = copy.deepcopy(model) if model is not None else small()
    before = copy.deepcopy(model.state_dict())
    with refused(code, UserError, path=str(path)) as caught:
        TrainingCheckpoint(path, {"method": "dense", **settings}).load(model)
    if keys is not None:
        assert caught.value.details["keys"][: len(keys)] == keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_cut_short_is_refused(state: Path, tmp_path: Path) -> None:
    content = state.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(content[:length])
        refuses(cut, "unreadable")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save(small().state_dict(), other)
    refuses(other, "wrong-type")
    other.write_text(json.dumps({"format": "vitpareto training"}))
    refuses(other, "unreadable")
    torch.save({"format": "vitpareto training", "version": 99}, other)
    refuses(other, "unsupported")
    # a pickle that would run code is not run
    torch.save({"format": Path("/")}, other)
    refuses(other, "unreadable")
    assert TrainingCheckpoint(tmp_path / "none.pt", {}).load(small()) is None


def test_a_checkpoint_of_another_training_is_refused(state: Path, tmp_path: Path) -> None:
    refuses(state, "mismatch", ["lr"], lr=0.1)
    held = tmp_path / "method.pt"
    shutil.copy(state, held)
    refuses(held, "mismatch", ["method"], method="tnt")
    wide = small()
    wide.head = nn.Linear(64, 11)
    refuses(state, "mismatch", ["head.weight", "head.bias"], wide)
    refuses(state, "mismatch", ["reduction.heads.0.bias"], small("tnt"))


def test_epochs_already_done_are_not_undone(state: Path) -> None:
    model = small()
    with pytest.raises(Interrupted):
        trained("dense", state, stop=2)
    kept = TrainingCheckpoint(state, {"method": "dense"}).load(model)
    assert kept is not None and len(kept.history) == 2
    with refused("out-of-range", name="epochs", got=1):
        fit(model, batches, Optimization(epochs=1, lr=1e-3), state=kept)
    with refused("mismatch", name="average"):
        fit(model, batches, Optimization(epochs=3, lr=1e-3, average=0.9), state=kept)


@pytest.mark.parametrize(
    "settings", [{"layer_decay": 0.0}, {"average": 1.0}, {"parts_scale": 0.0}], ids=str
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with refused("out-of-range", name=next(iter(settings))):
        Optimization(epochs=1, lr=1.0, **settings)


def test_the_average_is_the_models_weights_averaged() -> None:
    """timm's warmed-up decay, recomputed from the weights after every step."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.randint(2, (4,)))
    expected, checked = net.weight.detach().clone(), []

    def keep(state: TrainingState) -> None:
        nonlocal expected
        decay = min(0.6, 1 - (1 + len(state.history)) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * state.model["weight"]
        assert state.average is not None
        torch.testing.assert_close(state.average["weight"], expected)
        checked.append(expected)

    fit(net, lambda _: [batch], Optimization(epochs=5, lr=0.1, average=0.6), on_state=keep)
    assert len(checked) == 5 and not torch.equal(checked[0], checked[1])
    torch.testing.assert_close(net.weight.detach(), expected)


def test_parts_train_at_a_rate_of_their_own() -> None:
    """With AdamW's first step each weight moves by its rate, whatever the gradient."""
    for decay in (None, 0.5):
        model = small("patchmerger")
        before = copy.deepcopy(model.state_dict())
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            how = Optimization(
                epochs=1, lr=1e-3, weight_decay=0.0, parts_scale=8.0, clip_norm=None,
                layer_decay=decay,
            )  # fmt: skip
            fit(model, lambda e: batches(e)[:1], how)
        moved = {
            name: (value - before[name]).abs().max().item()
            for name, value in model.state_dict().items()
        }
        rate = 1e-3 / 2  # half way down the cosine of a single step
        assert moved["reduction.mergers.0.queries"] == pytest.approx(8 * rate, rel=1e-3)
        assert moved["head.weight"] == pytest.approx(rate, rel=1e-3)
        depth = 1 if decay is None else 0.6
        assert moved["blocks.0.mlp.fc1.weight"] < 1.01 * rate * depth


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_trains(method) -> None:
    losses = []
    for autocast in (None, torch.bfloat16):
        model = small(method)
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            how = Optimization(epochs=1, lr=1e-4, autocast=autocast)
            history = fit(model, batches, how, objective=supervised())
        losses.append(history[0].loss)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
