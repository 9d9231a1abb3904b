"""The one table of old names: what files of format 1 call things, and what they are called now.

TYPES: old class -> new class. FIELDS: for each class, by its new name, old field -> new field. A new field with dots
lies in a part of its own: `"diagonal": "pairs.flow_matching_ratio"`. VALUES: for a field, by its new name, old value ->
new value. PLACES: old place -> new place in a file, from its top. A file is translated before it is read, so that
nothing else in fewstep knows an old name.
"""

from typing import Any

TYPES: dict[str, str] = {
    "AdversaryConfig": "GANConfig",
    "Control": "PolicySpec",
    "CriticConfig": "DiscriminatorConfig",
    "Decoding": "LatentSpec",
}

_PAIRS = {"times": "pairs.times", "diagonal": "pairs.flow_matching_ratio", "to_end": "pairs.endpoint_share"}
_WEIGHTING = {
    "norm": "weighting.norm",
    "huber": "weighting.huber_c",
    "power": "weighting.weight_power",
    "offset": "weighting.weight_eps",
}
_DERIVATIVE = {"derivative": "derivative.kind", "step": "derivative.step"}
_LABELS = {"dropout": "label_dropout"}
_TARGET = {"decay": "target_decay"}
_ADJACENT = {**_LABELS, **_TARGET, "norm": "distance.kind", "huber": "distance.huber_c"}
_DISTILLED = {**_LABELS, **_TARGET, "distance": "distance.kind", "huber": "distance.huber_c"}

FIELDS: dict[str, dict[str, str]] = {
    "ISD": {**_PAIRS, **_WEIGHTING, **_DERIVATIVE, **_LABELS},
    "MeanFlow": {**_PAIRS, **_WEIGHTING, **_DERIVATIVE, **_LABELS},
    "ESD": {**_PAIRS, **_WEIGHTING, **_DERIVATIVE, **_LABELS},
    "LSD": {**_PAIRS, **_WEIGHTING, **_DERIVATIVE, **_LABELS},
    "PSD": {**_PAIRS, **_WEIGHTING, **_LABELS},
    "Shortcut": {**_WEIGHTING, **_LABELS, **_TARGET},
    "CT": _ADJACENT,
    "ECT": _ADJACENT,
    "Tangent": _DERIVATIVE,
    "SCT": _LABELS,
    "SCD": _LABELS,
    "CD": _DISTILLED,
    "CTM": {**_DISTILLED, "to_end": "endpoint_only", "adversarial": "gan"},
    "DiagonalMatching": _LABELS,
    "Regression": _LABELS,
    "EvaluationConfig": {"omega": "guidance_scale"},
    "StepTimes": {"omega": "guidance_scale"},
    "RunConfig": {"adversary": "gan"},
    "GANConfig": {"critic": "discriminator"},
}


def _kinds(ending: str, **stems: str) -> dict[Any, Any]:
    """Old word -> the settings of that name, which have no fields."""
    return {old.replace("_", "-"): {"type": f"{stem}{ending}"} for old, stem in stems.items()}


VALUES: dict[tuple[str, str], dict[Any, Any]] = {
    ("DataConfig", "source"): _kinds(
        "Source", digits="Digits", idx="Idx", images="Images", latents="Latents", demonstrations="Demonstrations",
        mixture="Mixture", npz="Npz", random="Random",
    ),
    ("ModelConfig", "path"): _kinds("PathConfig", linear="Linear", trig="Trig", edm="EDM", vp="VP"),
    ("ModelConfig", "preconditioning"): _kinds(
        "PreconditioningConfig", linear="Linear", trig="Trig", euler="Euler", cm="CM", bcm="BCM",
        analytic="Analytic", analytic_forward="AnalyticForward",
    ),
    ("ModelConfig", "scaling"): _kinds(
        "ScalingConfig", identity="Identity", unit="Unit", edm="EDM", edm_input="EDMInput"
    ),
}  # fmt: skip

PLACES: dict[str, str] = {
    "flow_map.class_names": "pipeline.class_names",
    "flow_map.data_range": "pipeline.data_range",
    "step_times": "pipeline.step_times",
    "decoding": "pipeline.latents",
    "control": "pipeline.policy",
}


def translated_file(record: dict[str, Any]) -> dict[str, Any]:
    """A file's record of format 1 in today's places and names; the record itself stays as it is."""
    found: dict[str, Any] = translated(record)
    for old, new in PLACES.items():
        *parts, field = old.split(".")
        place = _inner(found, parts)
        if place is not None and field in place:
            value = place.pop(field)
            *parts, field = new.split(".")
            target: Any = found
            for part in parts:
                target = target.setdefault(part, {}) if isinstance(target, dict) else None
            if isinstance(target, dict):  # else the file is damaged, which reading it tells
                target[field] = value
    return found


def _inner(record: Any, parts: list[str]) -> dict[str, Any] | None:
    """The object at a place of a record; None where there is none."""
    for part in parts:
        record = record.get(part) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else None


def translated(stored: Any) -> Any:
    """JSON values of format 1 in today's names; every object that carries a `type` is looked up, however deep."""
    if isinstance(stored, list):
        return [translated(item) for item in stored]
    if not isinstance(stored, dict):
        return stored
    old = stored.get("type")
    if not isinstance(old, str):
        return {key: translated(value) for key, value in stored.items()}
    name = TYPES.get(old, old)
    found: dict[str, Any] = {"type": name}
    for key, value in stored.items():
        if key != "type":
            renamed: str = FIELDS.get(name, {}).get(key) or key
            *parts, field = renamed.split(".")
            place = found
            for part in parts:
                place = place.setdefault(part, {})
            known = VALUES.get((name, ".".join((*parts, field))), {})
            simple = isinstance(value, (str, int, float, bool)) or value is None
            place[field] = known[value] if simple and value in known else translated(value)
    return found
