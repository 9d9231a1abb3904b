"""The environment decides nothing but which processes there are: what it says of training is named and ignored."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.data.base import Dataset
from fewstep.training import RunFolder, train_run
from fewstep.utils.errors import FewstepWarning
from tests.support.tiny import RUNTIME, TINY, assert_same_run


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_DYNAMO_BACKEND": "inductor", "ACCELERATE_DYNAMO_MODE": "max-autotune"},
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "1"},
        {"LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        {"ACCELERATE_TORCH_DEVICE": "meta"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_run_is_the_same_in_any_environment(
    variables: dict[str, str],
    digits: Dataset,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = unbroken("adamw")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(FewstepWarning, match="in the environment: ignored") as said:
        train_run(TINY, digits, RunFolder(tmp_path / "run"), RUNTIME)
    assert any(f"{name}={value}" in str(said[0].message) for name, value in variables.items())
    assert_same_run(tmp_path / "run", expected)


def test_what_a_launcher_says_by_default_is_no_news(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default", "DYNAMO_USE_DYNAMIC": "False"}
    for name, value in usual.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewstepWarning)
        train_run(TINY, digits, RunFolder(tmp_path / "run"), RUNTIME)
