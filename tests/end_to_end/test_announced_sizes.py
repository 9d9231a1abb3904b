"""Settings that announce more than a file of weights holds are refused before there is time or memory for them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.nn.modules.module import register_module_parameter_registration_hook

from fewstep.flow.flow_map import FlowMapConfig
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.networks.base import NetworkConfig
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.networks.unet1d import UNet1dConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.teachers.edm2_networks import EDM2UNetConfig
from fewstep.teachers.edm_networks import DhariwalUNetConfig, SongUNetConfig
from fewstep.training import RunFolder
from tests.support.commands import DISTILLED, SMALL, Command
from tests.support.foreign import save_foreign

MANY = 3_000_000
EDM_SIZES: dict[str, Any] = {"model_channels": 32, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
NETWORKS: dict[str, tuple[NetworkConfig, tuple[int, ...]]] = {
    "mlp": (MLPConfig(width=8, depth=1, embedding_width=8), (1, 4, 4)),
    "dit": (DiTConfig(width=16, depth=1, heads=2, patch=2), (1, 4, 4)),
    "unet": (UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), embedding_width=8), (1, 4, 4)),
    "unet1d": (UNet1dConfig(width=8, multipliers=(1,), embedding_width=8), (8, 2)),
    "song": (SongUNetConfig(**EDM_SIZES), (1, 4, 4)),
    "dhariwal": (DhariwalUNetConfig(**EDM_SIZES), (1, 4, 4)),
    "edm2": (EDM2UNetConfig(**EDM_SIZES), (1, 4, 4)),
}
SIZES: list[tuple[str, str, object]] = [
    ("mlp", "depth", MANY),
    ("mlp", "width", 30_000),
    ("mlp", "width", 10**30),
    ("mlp", "expansion", 1e300),
    ("dit", "depth", MANY),
    ("dit", "width", 16 * MANY),
    ("dit", "mlp_ratio", 1e300),
    ("unet", "blocks", MANY),
    ("unet", "blocks", 10**10),
    ("unet", "multipliers", [10**30]),
    ("unet", "multipliers", [1] * 50_000),
    ("unet1d", "blocks", MANY),
    ("unet1d", "multipliers", [MANY]),
    ("song", "num_blocks", MANY),
    ("song", "channel_mult", [10**12]),
    ("dhariwal", "num_blocks", 10**30),
    ("edm2", "num_blocks", MANY),
]


@dataclass
class Made:
    """How many parameters were put into modules."""

    count: int = 0


@contextmanager
def counting() -> Iterator[Made]:
    made = Made()

    def count(*_: object) -> None:
        made.count += 1

    hook = register_module_parameter_registration_hook(count)
    try:
        yield made
    finally:
        hook.remove()


def change(file: Path, *keys: str, value: object) -> None:
    record: Any = json.loads(file.read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(("network", "key", "value"), SIZES)
def test_a_saved_model_of_announced_sizes(
    network: str, key: str, value: object, command: Command, tmp_path: Path
) -> None:
    config, shape = NETWORKS[network]
    scaling = EDMScaling(0.5, EDM())
    Pipeline(FlowMapConfig(EDM(), EulerPreconditioning(EDM()), scaling, config, shape).build()).save(tmp_path / "model")
    assert command("sample", "model", "--count", 1, "--out", "a.npz", "--cpu").code == 0
    change(tmp_path / "model" / "config.json", "flow_map", "network", key, value=value)
    with counting() as made:
        shown = command("sample", "model", "--cpu")
    assert (shown.code, shown.err.count("\n")) == (2, 1), shown
    assert re.search(r"model/(config\.json is damaged|model\.safetensors is of another architecture)", shown.err)
    assert len(shown.err) < 3000
    assert made.count < 1000


def test_a_run_of_announced_sizes(command: Command, small_run: Path, tmp_path: Path) -> None:
    """Its own settings, which the command line may name too."""
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    run.config_file.write_bytes((small_run / "config.json").read_bytes())
    change(run.config_file, "run", "network", "depth", value=MANY)
    for words in (("train", "--resume", run.root, *SMALL[6:]), ("train", "digits", *SMALL, "--network.depth", MANY)):
        with counting() as made:
            shown = command(*words)
        assert (shown.code, shown.err.count("\n")) == (2, 1), shown
        assert "take a smaller network" in shown.err
        assert made.count < 10_000


def test_a_discriminator_of_announced_sizes(command: Command, archive: Path, tmp_path: Path) -> None:
    words = ("--data.source", "npz", "--data.root", archive, "--data.labels", *DISTILLED)
    small = ("--network.width", 16, "--network.depth", 1, "--network.embedding-width", 16)
    assert command("train", "edm-digits", *words, *small, "--out", "teacher").code == 0
    quick = ("--statistics.points", 8, "--statistics.samples", 16, "--gan.start-images", 0, "--objective.gan", 0.5)
    student = ("train", "ctm-digits", *words, *small, *quick, "--teacher", "teacher", "--out", "run")
    shown = command(*student, "--gan.discriminator.width", 10**6)
    assert (shown.code, "out of memory (a network of" in shown.err) == (2, True), shown
    assert command(*student, "--gan.discriminator.width", 10**30).code == 2
    assert command(*student, "--gan.discriminator.width", 4).code == 0
    change(tmp_path / "run" / "config.json", "run", "gan", "discriminator", "width", value=1000)
    shown = command("train", "--resume", "run", *SMALL[6:])
    assert (shown.code, "discriminator.safetensors is of another architecture" in shown.err) == (2, True), shown


def test_a_foreign_teacher_of_announced_sizes(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    save_foreign(tmp_path / "unet", "UNet2DModel", bare=True)
    file = tmp_path / "unet" / "config.json"
    whole = file.read_bytes()
    sizes: list[tuple[str, object]] = [("layers_per_block", MANY), ("block_out_channels", [32_000, 32_000])]
    for key, value in sizes:
        change(file, key, value=value)
        with counting() as made:
            shown = command("train", "ctm-digits", "--teacher", "unet", *DISTILLED)
        file.write_bytes(whole)
        assert (shown.code, shown.err.count("\n")) == (2, 1), shown
        assert re.search(r"unet: weights do not fit|a network of more than \d+ tensors", shown.err), shown
        assert made.count < 2000
