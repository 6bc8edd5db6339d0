"""Scalars out of TensorBoard's logs, and into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from icd_lightning.files import write_whole

Scalars = Mapping[str, tuple[list[int], list[float]]]  # name -> steps and values, ascending


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


def write_scalars(folder: Path, scalars: Scalars) -> Path:
    """Write an event file that holds these scalars and nothing else, for TensorBoard and `read_scalars`."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            writer = RecordWriter(stream)
            writer.write(Event(file_version="brain.Event:2").SerializeToString())
            for name, (steps, values) in scalars.items():
                for step, value in zip(steps, values, strict=True):
                    summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                    writer.write(Event(step=step, summary=summary).SerializeToString())

    path = folder / "events.out.tfevents.scalars"
    write_whole(path, write)
    return path


def thinned(scalars: Scalars, points: int) -> dict[str, tuple[list[int], list[float]]]:
    """Every n-th point, so that no more than `points` are left of each scalar; the last is kept."""
    kept = {}
    for name, (steps, values) in scalars.items():
        every = -(-len(steps) // points)
        first = (len(steps) - 1) % every
        kept[name] = (steps[first::every], values[first::every])
    return kept
