"""What the values in a file of weights may be: a rule for each key that is read later."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .colours import NORMALIZATIONS

Test = Callable[[Any], bool]
Rule = tuple[Test, str]  # whether a value is right, and in words what is


def _number(low: float, high: float, kind: type | tuple[type, ...] = (int, float)) -> Test:
    # NaN is in no range.
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Test:
    return _number(low, high, int)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list | tuple) and all(map(test, value))


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)  # also NaN, which is 0 / 0 in a score


def _is_plain(value: Any) -> bool:
    """Whether this is a dict of what JSON can hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, Mapping) and all(map(_is_text, value))


def _fits(tests: Mapping[str, Test]) -> Test:
    return lambda value: all(name in value and test(value[name]) for name, test in tests.items())


_trained = _fits({"epoch": _whole(0, 2**31), "train_loss": _number(-1e300, 1e300), "lr": _number(0, 1e300)})
_validated = _fits(
    {
        "dice": _number(-0.001, 1.001),
        "global_accuracy": _is_number,
        "recall": _list_of(_is_number),
        "iou": _list_of(_is_number),
        "mean_iou": _is_number,
    }
)


def _are_scales(value: Any) -> bool:
    return _list_of(_number(0.25, 5))(value) and len(value) > 0


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and _trained(value) and ("dice" not in value or _validated(value))


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), kind) for key, kind in _OPTIMIZER.items())


def _is_scaler(value: Any) -> bool:
    return isinstance(value, Mapping) and (not value or _fits(_SCALER)(value))


_OPTIMIZER = {"state": Mapping, "param_groups": list}
_SCALER = {
    "scale": _number(1e-30, 1e30),
    "growth_factor": _number(1.000001, 1e6),
    "backoff_factor": _number(1e-6, 0.999999),
    "growth_interval": _whole(1, 2**31),
    "_growth_tracker": _whole(0, 2**31),
}

RULES: dict[str, Rule] = {
    "mean": (_list_of(_number(-256, 256)), "a list of numbers from -256 to 256"),
    "std": (_list_of(_number(1e-6, 256)), "a list of numbers from 1e-06 to 256"),
    "normalization": (lambda value: _is_text(value) and value in NORMALIZATIONS, f"one of {', '.join(NORMALIZATIONS)}"),
    "normalization_assumed": (_is_bool, "True or False"),
    "fov_diameter": (_number(16, 20000), "pixels from 16 to 20000"),
    "trained_scale": (_number(1e-3, 1e3), "a number from 0.001 to 1000"),
    "close_ups": (_is_bool, "True or False"),
    "threshold": (lambda value: _number(0, 1)(value) and 0 < value < 1, "a number between 0 and 1"),
    "threshold_held_out": (_is_bool, "True or False"),
    "tta": (_is_bool, "True or False"),
    "tta_scales": (_are_scales, "a list of numbers from 0.25 to 5"),
    "averaged_steps": (_whole(1, 2**62), "a whole number of at least 1"),
    "epoch": (_whole(0, 2**31), "a whole number of at least 0"),
    "args": (_is_plain, "a dict of flags with plain values"),
    "best_dice": (_or_none(_number(-1, 1.001)), "a number from -1 to 1"),
    "history": (_list_of(_is_row), "a list with the row of each epoch"),
    # It names files that a resumed run writes.
    "results": (_or_none(lambda value: _is_text(value) and re.fullmatch(r"results[\d-]+", value)), "results<time>"),
    "trained_on": (_list_of(_is_text), "a list of digests"),
    "validated_on": (_list_of(_is_text), "a list of digests"),
    "trained_labels": (_list_of(_is_text), "a list of digests"),
    "validated_labels": (_list_of(_is_text), "a list of digests"),
    "compared_from": (_whole(0, 2**31), "a whole number of at least 0"),
    "selected_on": (_is_text, "a text"),
    "optimizer": (_is_optimizer, f"a dict with {' and '.join(_OPTIMIZER)}"),
    "scaler": (_is_scaler, f"empty, or a dict of numbers with {', '.join(_SCALER)}"),
}
ARGS_RULES: dict[str, Rule] = {
    "optimizer": (_is_text, "a text"),
    "base_size": (_or_none(_whole(2, 10**6)), "None or a whole number of at least 2"),
    "val_split": (_or_none(_whole(0, 10**6)), "None or a whole number of at least 0"),
}
MODEL_ARGS_RULES: dict[str, Rule] = {
    "in_channels": (_whole(1, 64), "a whole number from 1 to 64"),
    "num_classes": (_whole(2, 256), "a whole number from 2 to 256"),
    "base_c": (_whole(1, 1024), "a whole number from 1 to 1024"),
    "bilinear": (_is_bool, "True or False"),
}


def find_fault(values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> str | None:
    """The first value that breaks its rule, in words; None if all are right. Keys without a rule are not read."""
    for key, (test, allowed) in rules.items():
        if key in values and not test(values[key]):
            return f"{prefix}{key} is {in_short(values[key])}, but must be {allowed}"
    return None


def in_short(value: Any) -> str:
    """A value on one line, and not a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
