"""Demonstrations: the file both ways, chunks that never cross episodes, normalisers, bad files by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.data.demonstrations.chunks import ChunkSet, load_chunks, split_episodes
from fewstep.data.demonstrations.episodes import Demonstrations, load_demonstrations, save_demonstrations
from fewstep.data.demonstrations.normaliser import ChunkConfig, Normaliser
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.utils.errors import ConfigError, DataError, ShapeError

LENGTHS = (5, 3, 9, 4)


def example() -> Demonstrations:
    """Each number says which episode and step it is of."""
    episode = torch.cat([torch.full((n,), float(e)) for e, n in enumerate(LENGTHS)])
    step = torch.cat([torch.arange(n, dtype=torch.float32) for n in LENGTHS])
    ends = torch.tensor(LENGTHS).cumsum(0)
    return Demonstrations(
        torch.stack([episode, step, step], 1), torch.stack([episode, step], 1), ends, "toy", (-9.0, -9.0), (9.0, 9.0)
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_demonstrations(example(), tmp_path / "toy.safetensors")


@pytest.mark.parametrize("name", ["toy.safetensors", "toy.npz"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    found, own = load_demonstrations(save_demonstrations(example(), str(tmp_path / name))), example()
    assert (found.task, found.action_low, found.action_high) == (own.task, own.action_low, own.action_high)
    steps = f"{len(own)} episodes, {sum(LENGTHS)} steps"
    assert repr(found) == f"Demonstrations('toy': {steps}, 3 numbers seen and 2 moved)"
    for name in ("observations", "actions", "ends"):
        assert torch.equal(getattr(found, name), getattr(own, name))


def test_an_archive_is_read_too(tmp_path: Path) -> None:
    own = example()
    np.savez(
        tmp_path / "toy.npz",
        observations=own.observations.double().numpy(),
        actions=own.actions.numpy(),
        episode_ends=own.ends.int().numpy(),
        task="toy",
        action_low=np.array([-9.0, -9.0]),
        action_high=np.array([9.0, 9.0]),
    )
    found = load_demonstrations(tmp_path / "toy.npz")
    assert (found.task, found.action_high) == ("toy", (9.0, 9.0))
    assert torch.equal(found.observations, own.observations)


@given(st.integers(1, 4), st.integers(1, 12))
def test_chunks_never_cross_episodes(seen: int, horizon: int) -> None:
    demos, spec = example(), None
    from fewstep.data.demonstrations.normaliser import PolicySpec

    same = Normaliser((-1.0,) * 3, (1.0,) * 3)
    spec = PolicySpec("toy", ChunkConfig(seen, horizon, 1), same, Normaliser((-1.0,) * 2, (1.0,) * 2))
    chunks = ChunkSet(demos, torch.tensor([0, 2, 3]), spec)
    assert len(chunks) == 5 + 9 + 4
    actions, _ = chunks.fetch(torch.arange(len(chunks)))
    context = chunks.context(torch.arange(len(chunks)))
    assert context.observation is not None
    assert context.loss_mask is not None
    assert actions.shape == (18, horizon, 2)
    assert context.observation.shape == (18, seen, 3)
    for k in range(len(chunks)):
        episode, step = context.observation[k, -1, :2].tolist()
        length = LENGTHS[int(episode)]
        assert (actions[k, :, 0] == episode).all()
        assert (context.observation[k, :, 0] == episode).all()
        expected = [min(step + j, length - 1) for j in range(horizon)]
        assert actions[k, :, 1].tolist() == expected
        assert context.observation[k, :, 1].tolist() == [max(step - j, 0) for j in reversed(range(seen))]
        assert context.loss_mask[k, :, 0].tolist() == [step + j < length for j in range(horizon)]


def test_whole_episodes_are_held_out_and_normalisers_know_the_others_alone(file: Path) -> None:
    data = load_chunks(str(file), ChunkConfig(1, 2, 1), heldout=0.3, seed=0)
    train, held = split_episodes(4, 0.3, 0)
    assert sorted([*train.tolist(), *held.tolist()]) == [0, 1, 2, 3]
    assert len(held) == 1
    assert len(data.train) == sum(LENGTHS[e] for e in train.tolist())
    assert data.policy is not None
    own, rows = example(), [e in train.tolist() for e in example().actions[:, 0].int().tolist()]
    assert data.policy.actions.high == tuple(own.actions[torch.tensor(rows)].amax(0).tolist())
    values = data.train.fetch(torch.arange(len(data.train)))[0]
    assert (values.min(), values.max()) == (-1, 1)
    assert data.shape == (2, 2)


def test_the_source_is_known_by_its_name(file: Path) -> None:
    data = load_dataset(DataConfig(source="demonstrations", root=str(file), chunks=ChunkConfig(2, 4, 2)))
    assert data.name == "toy"
    assert data.shape == (4, 2)
    other = load_dataset(DataConfig(source="demonstrations", root=str(file), chunks=ChunkConfig(1, 4, 2)))
    assert data.fingerprint != other.fingerprint


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_normalising_is_undone(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)[:, None].repeat(1, 2)
    values[:, 1] = 4.0
    normaliser = Normaliser.fit(values)
    encoded = normaliser.encode(values)
    assert encoded.abs().max() <= 1 + 1e-9
    assert (encoded[:, 1] == 0).all()
    torch.testing.assert_close(normaliser.decode(encoded), values, rtol=1e-12, atol=1e-9)


def test_a_normaliser_refuses_another_size() -> None:
    with pytest.raises(ShapeError, match="of 2 numbers"):
        Normaliser((0.0, 0.0), (1.0, 1.0)).encode(torch.zeros(3))


@pytest.mark.parametrize("values", [(0, 4, 2), (2, 0, 1), (2, 4, 5), (2, 4, 0)])
def test_chunks_without_sense_are_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="at least one of each"):
        ChunkConfig(*values)


def broken(**changes: Tensor) -> Demonstrations:
    own = example()
    fields = {name: getattr(own, name) for name in ("observations", "actions", "ends")}
    return Demonstrations(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observations": torch.zeros(20, 3)}, r"\(20, 3\).*\(21, 2\)"),
        ({"actions": torch.zeros(21)}, r"\(21,\)"),
        ({"actions": torch.zeros(21, 2).double()}, "float64"),
        ({"ends": torch.tensor([5, 8, 17, 20])}, "21 steps"),
        ({"ends": torch.tensor([5, 5, 17, 21])}, "rise"),
        ({"ends": torch.tensor([], dtype=torch.int64)}, "rise"),
        ({"actions": torch.full((21, 2), torch.nan)}, "step 0 has actions that are not finite"),
    ],
)
def test_what_is_no_demonstration_is_refused(changes: dict[str, Tensor], said: str) -> None:
    with pytest.raises(DataError, match=said):
        broken(**changes)


def test_bad_files_are_refused_by_name(tmp_path: Path, file: Path) -> None:
    with pytest.raises(DataError, match=r"none\.safetensors: no such file"):
        load_demonstrations(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.safetensors is damaged"):
        load_demonstrations(cut)
    other = tmp_path / "other.npz"
    np.savez(other, observations=np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"other\.npz lacks actions, episode_ends"):
        load_demonstrations(other)
    np.savez(other, observations=np.zeros((30, 2)), actions=np.zeros((30, 2)), episode_ends=np.array([30]))
    whole = other.read_bytes()
    for cut_at in (60, 300, len(whole) - 30):
        other.write_bytes(whole[:cut_at])
        with pytest.raises(DataError, match=r"other\.npz is damaged"):
            load_demonstrations(other)
    other.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"other\.npz is damaged"):
        load_demonstrations(other)
    with pytest.raises(DataError, match="no demonstrations given"):
        load_chunks("", ChunkConfig(), 0.1, 0)
    single = save_demonstrations(
        Demonstrations(torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([3])), tmp_path / "one.safetensors"
    )
    with pytest.raises(DataError, match="1 episode"):
        load_chunks(str(single), ChunkConfig(), 0.1, 0)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        ((0.0,), (1.0,), "1 and 1 numbers for actions of 2"),
        ((0.0, 0.0), (), "2 and 0 numbers"),
        ((), (1.0, 1.0), "0 and 2 numbers"),
        ((1.0, 0.0), (0.0, 1.0), "the first below the second"),
        ((float("nan"), 0.0), (1.0, 1.0), "must be finite"),
        ((-1.0, -1.0), (1.0, 0.4), r"action 0\.5 of step 2 lies outside its bounds \[-1, 0\.4\]"),
    ],
)
def test_bounds_must_fit(low: tuple[float, ...], high: tuple[float, ...], said: str) -> None:
    actions = torch.zeros(3, 2)
    actions[2, 1] = 0.5
    with pytest.raises(DataError, match=said):
        Demonstrations(torch.zeros(3, 1), actions, torch.tensor([3]), action_low=low, action_high=high)


def test_what_hardly_varies_takes_no_part() -> None:
    values = torch.tensor([[0.0, 1e4, 0.0, 0.3], [9e-5, 1e4 + 5e-3, 1e-3, 0.3]], dtype=torch.float64)
    normaliser = Normaliser.fit(values)
    assert normaliser.varied.tolist() == [False, False, True, False]
    encoded = normaliser.encode(values + 100)
    assert not encoded[:, [0, 1, 3]].any()
    assert normaliser.encode(values)[:, 2].tolist() == [-1.0, 1.0]
    decoded = normaliser.decode(torch.randn(5, 4, dtype=torch.float64))
    torch.testing.assert_close(decoded[:, [0, 1, 3]], values.mean(0)[[0, 1, 3]].expand(5, 3), rtol=1e-15, atol=0)
