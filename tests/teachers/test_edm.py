"""Teachers from network pickles of EDM and EDM2: the denoisers that their formulas say; and files that mean harm."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import NULL_LABEL, Condition
from fewstep.sampling.pipeline import Pipeline, load_pipeline
from fewstep.teachers.edm import is_edm, load_edm
from fewstep.teachers.edm_networks import EDMNetwork
from fewstep.teachers.edm_pickle import read_edm
from fewstep.utils.errors import CheckpointError
from fewstep.utils.forward_ad import jvp
from tests.support import edm_files
from tests.support.edm_files import TINY, Persistent, Runs, save_edm, write
from tests.support.edm_reference import ADM, EDM2, Song, Weights

LEVELS = (0.05, 0.6, 8.0, 60.0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[FlowMap, Weights]]:
    found = {}
    for kind in TINY:
        file = tmp_path_factory.mktemp(kind) / "network-snapshot.pkl"
        weights = save_edm(file, kind)
        assert is_edm(file)
        found[kind] = load_edm(file).double().requires_grad_(False), weights
    return found


def iddpm_levels() -> Tensor:
    """u_0 > u_1 > ... > u_M = 0 of a hundred steps (2206.00364, table 1)."""
    level = [math.sin(math.pi / 2 * j / 100 / 1.008) ** 2 for j in range(101)]
    u = [0.0]
    for j in range(100, 0, -1):
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(level[j - 1] / level[j], 0.001) - 1))
    return torch.tensor(u, dtype=torch.float64)


def raw(kind: str, w: Weights, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """F by the reference."""
    if kind == "adm":
        return ADM(w, (1, 1))(x, t, labels)
    if kind == "edm2":
        return EDM2(w)(x, t, labels)
    own = {"ncsnpp": edm_files.NCSNPP, "skips": edm_files.SKIPS}.get(kind, edm_files.DDPMPP)
    return Song(w, (1, 3, 3, 1) if kind in ("ncsnpp", "skips") else (1, 1))(x, t, labels, own)


def denoised(kind: str, w: Weights, x: Tensor, sigma: float, labels: Tensor) -> Tensor:
    """D by table 1 of 2206.00364."""
    if kind == "vp":
        t = (math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(sigma**2)) - 0.1) / 19.9
        scale, skip, out, noise = math.hypot(1, sigma), 1.0, -sigma, 999 * t
    elif kind == "ncsnpp":
        scale, skip, out, noise = 1.0, 1.0, sigma, math.log(sigma / 2)
    elif kind == "iddpm":
        nearest = int((iddpm_levels() - sigma).abs().argmin())
        scale, skip, out, noise = math.hypot(1, sigma), 1.0, -sigma, float(99 - nearest)
    else:
        data = 0.6 if kind == "ddpmpp" else 0.5
        scale = math.hypot(sigma, data)
        skip, out, noise = (data / scale) ** 2, sigma * data / scale, math.log(sigma) / 4
    found = raw(kind, w, x / scale, torch.full((len(x),), noise, dtype=torch.float64), labels)
    return skip * x + out * found[:, : x.shape[1]]


def draw(sigma: float, dtype: torch.dtype = torch.float64) -> Tensor:
    noise = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(int(9 * sigma)))
    return (math.hypot(1, sigma) * noise).to(dtype)


LABELS = torch.tensor([2, NULL_LABEL, 0])
ONE_HOT = torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize("kind", TINY)
def test_its_denoiser_is_what_the_formulas_say(kind: str, teachers: dict[str, tuple[FlowMap, Weights]]) -> None:
    """Networks and preconditioners written out a second time agree at every level; a row without a label has zeros."""
    teacher, weights = teachers[kind]
    levels = iddpm_levels()[[1, 30, 90, 99]].tolist() if kind == "iddpm" else LEVELS
    for sigma in levels:
        if sigma > teacher.path.t_max:
            continue
        x = draw(sigma)
        t = torch.full((3,), sigma, dtype=torch.float64)
        expected = denoised(kind, weights, x, sigma, ONE_HOT)
        torch.testing.assert_close(teacher.denoise(x, t, Condition(labels=LABELS)), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        teacher.denoise(x, t), teacher.denoise(x, t, Condition(labels=torch.full((3,), NULL_LABEL))), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", TINY)
def test_derivatives_pass_forward_through_it(kind: str, teachers: dict[str, tuple[FlowMap, Weights]]) -> None:
    """The derivative of N along (v, 1, 0.3) is the limit of differences."""
    teacher, _ = teachers[kind]
    network: Any = teacher.network
    moved = list(network.two_times.new_parameters())
    for parameter in moved:
        parameter.add_(0.02)
    t, s = torch.full((3,), 1.1, dtype=torch.float64), torch.full((3,), 0.4, dtype=torch.float64)
    x, v, cond = draw(1.1), draw(0.3), Condition(labels=LABELS)
    tangents = v, torch.ones_like(t), torch.full_like(s, 0.3)

    def at(step: float) -> Tensor:
        moved_x, moved_t, moved_s = (a + step * b for a, b in zip((x, t, s), tangents, strict=True))
        return teacher.output(moved_x, moved_t, moved_s, cond)

    _, exact = jvp(lambda x, t, s: teacher.output(x, t, s, cond), (x, t, s), tangents)
    h = 1e-4
    limit = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    torch.testing.assert_close(exact, limit, rtol=1e-5, atol=1e-5)
    for parameter in moved:
        parameter.sub_(0.02)


@pytest.mark.parametrize("kind", TINY)
def test_its_student_equals_it_at_first_wherever_jumps_end(kind: str, tmp_path: Path) -> None:
    """To the last bit, saved and loaded too; s counts once its branch has moved."""
    save_edm(tmp_path / "network.pkl", kind)
    teacher = load_edm(tmp_path / "network.pkl").requires_grad_(False)
    Pipeline(teacher).save(tmp_path / "saved")
    x, cond = draw(2.0, torch.float32), Condition(labels=LABELS)
    t, s = torch.full((3,), 2.0), torch.full((3,), 0.2)
    expected = teacher.denoise(x, t, cond)
    for flow_map in (teacher, load_pipeline(tmp_path / "saved").flow_map):
        assert torch.equal(flow_map.output(x, t, s, cond), expected)
    assert isinstance(teacher.network, EDMNetwork)
    assert teacher.network.last_layer.shape[0] in (2, 4)
    for parameter in teacher.network.two_times.new_parameters():
        parameter.add_(0.1)
    assert not torch.equal(teacher.output(x, t, s, cond), teacher.output(x, t, t, cond))


def test_the_path_is_over_the_levels_that_the_file_says(tmp_path: Path) -> None:
    """Where it says none, EDM's own; VP's are those of its clock."""
    ends = {"ddpmpp": (0.002, 80.0), "ncsnpp": (0.02, 100.0), "vp": (0.0010005, 152.167), "edm2": (0.002, 80.0)}
    for kind, expected in ends.items():
        save_edm(tmp_path / "network.pkl", kind)
        path = load_edm(tmp_path / "network.pkl").path
        assert (path.t_min, path.t_max) == pytest.approx(expected, rel=1e-4)
    save_edm(tmp_path / "network.pkl", "ddpmpp", sigma_min=0.1, sigma_max=10.0)
    assert load_edm(tmp_path / "network.pkl").path.t_max == 10.0


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    """As EDM2's networks are stored."""
    stored, weights = edm_files.network("edm2")
    halves = edm_files.module(
        {name: value.half() for name, value in weights.items()}, "Precond", "MPConv",
        _init_kwargs=stored.meta["state"]["_init_kwargs"], _init_args=(8,),
    )  # fmt: skip
    teacher = load_edm(write(tmp_path / "network.pkl", {"ema": halves}))
    own = teacher.network.state_dict()["two_times.network.out_conv.weight"]
    assert torch.equal(own, weights["unet.out_conv.weight"].half().float())


def refused(file: Path) -> str:
    """The one line that a file ends in."""
    with pytest.raises(CheckpointError) as caught:
        load_edm(file)
    line = str(caught.value)
    assert "\n" not in line
    assert str(file) in line
    return line


def rebuilt(content: bytes, size: tuple[int, ...] = (4,)) -> Runs:
    """A tensor whose storage is torch.load's to make of the content."""
    stored = Runs(torch.storage._load_from_bytes, content)
    return Runs(torch._utils._rebuild_tensor_v2, stored, 0, size, (1,) * len(size), False, {})


def in_a_module(value: Any) -> Persistent:
    return Persistent("EDMPrecond", _parameters={"weight": value}, _init_args=(8, 2), _init_kwargs={})


def as_argument(value: Any) -> Persistent:
    return Persistent("EDMPrecond", _init_args=(8, 2), _init_kwargs={"sigma_data": value})


class _Nested:
    """A class of a module that is nobody's."""


_Nested.__module__ = "subprocess"


@pytest.mark.parametrize("place", ["file", "network", "parameter", "argument", "storage", "state"])
@pytest.mark.parametrize("function", ["system", "eval"])
def test_a_call_is_never_made(tmp_path: Path, place: str, function: str) -> None:
    """Wherever it stands, in whatever wrapping."""
    mark = tmp_path / "mark"
    harm = Runs(os.system, f"touch {mark}") if function == "system" else Runs(eval, f"open({str(mark)!r}, 'w')")
    content = {
        "file": lambda: harm,
        "network": lambda: {"ema": harm},
        "parameter": lambda: {"ema": in_a_module(harm)},
        "argument": lambda: {"ema": as_argument(harm)},
        "storage": lambda: {"ema": in_a_module(rebuilt(_pickled(tmp_path, harm)))},
        "state": lambda: {"ema": Persistent("EDMPrecond", harm=harm)},
    }[place]()
    line = refused(write(tmp_path / "network.pkl", content))
    assert "nothing in it was run" in line
    assert not mark.exists()


def _pickled(folder: Path, value: Any) -> bytes:
    torch.save(value, folder / "saved.pt")
    return (folder / "saved.pt").read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"ema": as_argument(np.array([{}], dtype=object))}, "numpy values of type 'O8'"),
        (np.array([{}], dtype=object), "numpy values of type 'O8'"),
        ({"ema": as_argument(np.ones(3))}, "sigma_data is no number"),
        ({"ema": Persistent("Generator", _init_kwargs={})}, "'Generator', no preconditioner"),
        ({"ema": Persistent("EDMPrecond", _init_kwargs={}, _modules={"model": Persistent("Evil")})}, "'Evil' is none"),
        ({"ema": Persistent("Precond", _init_kwargs={}, _modules={"unet": Persistent("SongUNet")})}, "'SongUNet' is"),
        ({"ema": Persistent("EDMPrecond", _modules=[])}, "a NoneType stands"),
        ({"ema": torch.ones(3)}, "_rebuild_tensor_v2 stands where a module should"),
        ({"ema": torch.nn.Linear(2, 2)}, "it names torch.nn.modules.linear.Linear"),
        ({"net": 1}, "no network under the name 'ema'"),
        ([1, 2], "no network under the name 'ema'"),
        ({"ema": _Nested}, "it names subprocess._Nested"),
        ({"ema": in_a_module(rebuilt(b"no storage"))}, "a storage in it is damaged"),
        ({"ema": in_a_module(rebuilt(edm_files.storage_of(4, 4), (2_500_000_000,)))}, "in a storage of 4 numbers"),
        ({"ema": in_a_module(rebuilt(edm_files.storage_of(2_500_000_000, 4)))}, "a storage in it is damaged"),
        ({"ema": in_a_module(torch.ones(3, dtype=torch.int64))}, "a tensor holds torch.int64"),
        ({"ema": in_a_module(torch.ones(3).as_strided((3,), (0,))), "x": 2**200}, "cannot be built"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # others say where they lie in memory
)
def test_what_is_no_network_is_refused_in_one_line(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subprocess._Nested", _Nested, raising=False)
        write(tmp_path / "network.pkl", content)
    assert reason in refused(tmp_path / "network.pkl")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_channels": 10**6}, "weights do not fit"),
        ({"model_channels": 10**30}, "model_channels has numbers beyond"),
        ({"channel_mult": [10**5, 10**6], "channel_mult_emb": 10**6}, "weights do not fit"),
        ({"num_blocks": 10**6}, "blocks at each level"),
        ({"channel_mult": [1] * 10**4}, "blocks at each level"),
        ({"img_channels": 10**12}, "img_channels must be a whole number"),
        ({"label_dim": 7}, "weights do not fit"),
        ({"model_channels": 8.5}, "model_channels must be"),
        ({"attention_type": "linear"}, "unknown key attention_type"),
        ({"log_half": True}, "unknown key log_half"),
        ({"model_type": "HDiT"}, "networks of class 'HDiT' are not known; known are SongUNet, DhariwalUNet"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "range [3.0, 2.0] is empty"),
        ({"sigma_data": "half"}, "sigma_data must be a number"),
        ({"sigma_data": float("nan")}, "sigma_data must be a number"),
        ({"embedding_type": "learned"}, "embedding_type"),
        ({"resample_filter": []}, "filter"),
        ({"img_resolution": 9}, "halved"),
    ],
    ids=str,
)
def test_arguments_that_make_no_network_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """Before anything of their size is made."""
    if "img_resolution" in changes:
        stored = edm_files.network("ddpmpp")[0]
        stored.meta["state"]["_init_args"] = (changes["img_resolution"],)
        write(tmp_path / "network.pkl", {"ema": stored})
    else:
        save_edm(tmp_path / "network.pkl", "ddpmpp", **changes)
    assert reason in refused(tmp_path / "network.pkl")


def test_a_file_cut_short_or_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    """Wherever it ends; and whatever byte is another, it is read or refused."""
    file = tmp_path / "network.pkl"
    save_edm(file, "ddpmpp")
    content = file.read_bytes()
    for end in [0, 1, 2, *range(3, len(content), len(content) // 20)]:
        file.write_bytes(content[:end])
        refused(file)
    places = torch.randint(len(content), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :])
        with suppress(CheckpointError):
            read_edm(file)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x82\x01.",
        b"\x80\x04Pid\n.",
        b"\x80\x04j\xff\xff\xff\x7f.",
        b"\x80\x04]\x94r\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\x00\xe4\x0b\x54\x02\x00\x00\x00.",
        b"\x80\x04ccollections\nOrderedDict\n}b.",
        b"(ios\nsystem\n.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04" + b"]a" * 9,
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
    ],
    ids=["extension", "persistent", "get", "put", "10 GB", "build", "inst", "protocol 0", "append", "deep"],
)
def test_opcodes_that_these_files_do_not_use_end_the_reading(tmp_path: Path, content: bytes) -> None:
    """None is looked up in a registry, and nothing is allotted before it is there."""
    (tmp_path / "network.pkl").write_bytes(content)
    refused(tmp_path / "network.pkl")


def test_modules_in_two_places_or_too_deep_are_refused(tmp_path: Path) -> None:
    """Else a few lines could stand for any number of them."""
    inner = Persistent("Conv2d")
    for _ in range(12):
        inner = Persistent("Conv2d", _modules={"a": inner, "b": inner})
    content = {"ema": Persistent("EDMPrecond", _init_kwargs={}, _modules={"model": inner})}
    assert "two places" in refused(write(tmp_path / "network.pkl", content))
    deep = Persistent("Conv2d")
    for _ in range(40):
        deep = Persistent("Conv2d", _modules={"a": deep})
    content = {"ema": Persistent("EDMPrecond", _init_kwargs={}, _modules={"model": deep})}
    assert "too deep" in refused(write(tmp_path / "network.pkl", content))


def test_other_files_are_told_from_network_pickles(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "zip.pt").write_bytes(b"PK\x03\x04")
    assert not is_edm(tmp_path / "empty")
    assert not is_edm(tmp_path / "zip.pt")
    assert not is_edm(tmp_path)
    assert not is_edm(tmp_path / "nowhere")
    assert "cannot be read" in refused(tmp_path / "nowhere")
