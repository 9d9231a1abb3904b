"""What `fewstep train --help` says, without PyTorch: names of recipes are read off their source."""

import ast
from pathlib import Path


def recipe_names() -> list[str]:
    """The names in fewstep.recipes.RECIPES: public functions of the modules that its _MODULES lists."""
    folder = Path(__file__).parents[1] / "recipes"
    statements = ast.parse((folder / "__init__.py").read_text()).body
    modules = next(
        each.value
        for each in statements
        if isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == "_MODULES"
    )
    assert isinstance(modules, ast.Tuple)
    names = []
    for module in modules.elts:
        assert isinstance(module, ast.Name)
        functions = ast.parse((folder / f"{module.id}.py").read_text()).body
        names += [each.name for each in functions if isinstance(each, ast.FunctionDef) and each.name[0] != "_"]
    return [name.replace("_", "-") for name in names]


def train_usage() -> str:
    """How training is asked for."""
    return f"""usage: fewstep train RECIPE [options]
       fewstep train --resume RUN [options]

Recipes: {", ".join(recipe_names())}

A recipe of your own is a function in FILE.py or FILE.py:FUNCTION; any run's is RUN/config.json.
The same command goes on where a run stopped, and so does --resume RUN with no other option; --from STEP goes back to
the checkpoint of that step, --data.root FOLDER says where its data lie now. --initial RUN starts a new run from the
weights of another.
fewstep train RECIPE --help shows the options that people change, with the recipe's values; --help-all every one."""
