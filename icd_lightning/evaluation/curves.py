"""Scalars back out of TensorBoard logs."""

from __future__ import annotations

from pathlib import Path


def read_scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Every scalar of a run's event files by name: steps and values, ascending; a resumed run's files are joined."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
        accumulator.Reload()
        for name in accumulator.Tags()["scalars"]:
            points.setdefault(name, {}).update({event.step: event.value for event in accumulator.Scalars(name)})
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in points.items()}
