"""`fewstep policy-quickstart`: the same for a robot's policy, in a maze with two ways."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from fewstep.cli.quickstart import check_seconds, limited
from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.data.sources import load_dataset
from fewstep.evaluation.report.run import report
from fewstep.evaluation.rollouts import draw_film, expert_row, measure_rollouts, record_demonstrations
from fewstep.policies.figures import Row, rollout_table, write_rollouts
from fewstep.recipes import recipe
from fewstep.training import RunFolder, Runtime, train_run

POLICY_TASK = "pointmaze-ring"
POLICY_DEMONSTRATIONS, POLICY_EPISODES = 100, 50
POLICY_RUNS = {"policy-mlp": ".", "policy-flow-matching": "flow-matching", "policy-regression": "regression"}
"""Recipes of this quickstart, and where in its folder each trains."""


@dataclass(frozen=True)
class Options:
    """Record demonstrations of a maze with two ways, train iSD, flow matching and regression, let them act, report."""

    out: Path = Path("runs/policy-quickstart")
    """Folder of the run; started again on it, the command goes on where it stopped."""
    seconds: float = 100.0
    """Longest training time of each of the three methods."""
    runtime: Runtime = field(default_factory=Runtime)


def run(options: Options) -> None:
    """Run the quickstart in its folder."""
    print(f"Report: {policy_quickstart(options.out, options.runtime, options.seconds)}")


def policy_quickstart(root: Path, runtime: Runtime, seconds: float) -> Path:
    """Demonstrations of the ring maze, iSD, flow matching and regression, report.html.

    Each trains for `seconds`. Started again on the same folder it goes on where it stopped. Raises what
    `record_demonstrations`, `train` and `roll_out` raise.
    """
    check_seconds(seconds)
    root = root.resolve()
    runtime = replace(runtime, threads=runtime.threads or 1)  # the fastest for networks this small
    demonstrations = root.with_name(f"{root.name}-demos") / f"{POLICY_TASK}.safetensors"
    if not demonstrations.is_file():
        print(f"1/4  demonstrations of {POLICY_TASK}", flush=True)
        print(record_demonstrations(POLICY_TASK, POLICY_DEMONSTRATIONS, demonstrations, 0, None).splitlines()[0])
    runs = {name: RunFolder(root / folder) for name, folder in POLICY_RUNS.items()}
    rows: list[Row] = []
    for part, (name, run) in enumerate(runs.items(), 2):
        config = limited(recipe(name), seconds)
        config = replace(config, data=replace(config.data, root=str(demonstrations)))
        print(f"{part}/4  {name}: at most {seconds:.0f} s", flush=True)
        result = train_run(config, load_dataset(config.data), run, runtime)
        print(f"     {result.images:,} chunks of actions in {result.seconds:.0f} s", flush=True)
        found, task, policy = measure_rollouts(run.root, (), "", POLICY_EPISODES, 0, FIRST_TEST_SEED, 25, None)
        if run.root == root:
            found.append(expert_row(task, POLICY_EPISODES, FIRST_TEST_SEED))
        write_rollouts(found, run.root)
        draw_film(policy, task, FIRST_TEST_SEED, run.root)
        rows += found
    print(rollout_table(rows))
    return report(runs["policy-mlp"], title="fewstep: a robot's policy in one network call")
