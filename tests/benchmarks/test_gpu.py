"""What is measured of a GPU runs on a CPU too, small."""

from dataclasses import replace

from benchmarks.engine import gpu
from fewstep.networks.dit import DiTConfig
from fewstep.recipes import recipe


def test_all_that_is_measured_has_rows() -> None:
    """But for the tests marked gpu, which tests/gpu are, and what is compiled, which takes long."""
    scale = replace(gpu.DRY, compiled=())
    rows = [row for part in (gpu.attentions, gpu.steps, gpu.samplers) for row in part(scale)]
    assert all(row.keys() == {"measure", "setting", "value", "unit", "beside"} for row in rows)
    assert len({(row["measure"], row["setting"]) for row in rows}) == len(rows)
    measured = {row["measure"]: row["value"] for row in rows}
    assert measured.keys() == {
        "attention, time", "attention, peak memory", "a step", "a step, share of the device's peak",
        "a step, peak memory", "a step, ratio", "sampler latency",
    }  # fmt: skip
    of_steps = [row for row in rows if row["measure"] == "a step"]
    for name in gpu.DRY.networks:
        for objective in ("flow matching", "iSD, finite differences", "iSD, exact"):
            assert any(name in row["setting"] and row["setting"].endswith(objective) for row in of_steps)
    assert all(row["value"] > 0 for row in of_steps)


def test_what_does_not_fit_into_the_time_is_named() -> None:
    scale = replace(gpu.DRY, until=0.0)
    rows = [row for part in (gpu.steps, gpu.attentions, gpu.samplers) for row in part(scale)]
    assert {row["measure"] for row in rows} == {"a step", "attention, time", "sampler latency"}
    assert all(row["value"] is None and row["beside"] == "no time was left" for row in rows)
    turns: list[int] = []
    assert gpu.seconds(lambda: turns.append(1), scale, 9) > 0
    assert len(turns) == 2


def test_a_part_that_fails_is_a_row_that_says_why() -> None:
    scale = replace(gpu.DRY, networks={"imagenet256-dit-b4": (DiTConfig(width=30, heads=4, patch=4), 4, 4)})
    rows = [row for row in gpu.steps(scale) if row["measure"] == "a step"]
    assert rows
    assert all(row["value"] is None and "must be a multiple of 4" in row["beside"] for row in rows)


def test_the_full_size_is_that_of_the_recipes() -> None:
    for name, (network, batch, most) in gpu.FULL.networks.items():
        assert network == recipe(name).network
        assert batch % most == 0
