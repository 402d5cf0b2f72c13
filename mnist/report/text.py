"""Sentences on hyperparameters and records, for the terminal and the report."""

import statistics
from collections.abc import Mapping
from typing import Any

from mnist.search.study import BASELINES


def format_value(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def format_params(params: dict[str, Any]) -> str:
    """ "batch_size 33, optimizer Adam, lr 0.00039" """
    return ", ".join(f"{name} {format_value(value)}" for name, value in params.items())


def describe_confirmation(record: Mapping[str, Any]) -> list[str]:
    """The winner's accuracy on fresh seeds, in lines; none where it was not confirmed."""
    validation, gain = record["metrics"]["validation"], describe_gain(record)
    if validation["std"] is None:
        return []
    mean, deviation, n = (validation[key] for key in ("mean", "std", "seeds"))
    line = f"confirmed: {mean:.2%} ± {deviation:.2%} on fresh seeds (n = {n})"
    return [line, gain] if gain else [line]


def describe_gain(record: Mapping[str, Any]) -> str | None:
    """The gain over the baselines, in errors on fresh seeds; None for records without it."""
    gain = record["study"].get("worth", {})
    if not {"winner", *BASELINES} <= set(gain):
        return None
    n = record["dataset"]["splits"]["validation"]
    winner, first, median = (
        round(n * (1 - statistics.fmean(gain[name]["accuracies"])))
        for name in ("winner", *BASELINES)
    )
    return (
        f"on the same fresh seeds the winner makes {winner} errors of {n:,} validation images, "
        f"the first trial {first}, the median trial {median}"
    )
