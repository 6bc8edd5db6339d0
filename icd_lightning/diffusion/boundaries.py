"""Where students land: the time axis cut into segments, the jumps that sampling makes, the pairs that training draws.

Timesteps run from 0 (data) to num_train_timesteps - 1 (noise). The teacher's solver stands on a grid of
num_solver_steps points; boundary_timesteps are the m + 1 ends of m segments. Reverse and forward students differ in
nothing but what they read here: one falls to the lower end of its segment, the other climbs to the upper end.
"""

from bisect import bisect_left
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from icd_lightning.diffusion.process import Process

Direction = Literal["reverse", "forward"]
"""Of a student: noise -> image, or image -> noise."""

_T = TypeVar("_T", bound="_Table")


@dataclass(frozen=True, eq=False)
class _Table:
    """Long columns of equal length (N,), indexed together."""

    t: Tensor

    def __len__(self) -> int:
        return self.t.numel()

    def __getitem__(self: _T, index: Tensor) -> _T:
        """The rows at index (B,) long, each column (B,), on the index's device."""
        return type(self)(*(getattr(self, f.name).to(index.device)[index] for f in fields(self)))


@dataclass(frozen=True, eq=False)
class TrainingPairs(_Table):
    """For a consistency loss: t (N,), t_next (N,) one solver step further, and boundary (N,), where both must land."""

    t_next: Tensor
    boundary: Tensor
    segment: Tensor


@dataclass(frozen=True, eq=False)
class RoundTrips(_Table):
    """For a preservation loss: away from t (N,) to s (N,), the other end of a segment, and back to t."""

    s: Tensor
    segment: Tensor


@dataclass(frozen=True)
class Boundaries:
    """The m + 1 ascending ends of m segments, from 0 to num_train_timesteps - 1, and the solver grid they lie on.

    A leading 0 may be left out, as in the names of released files: (259, 519, 779, 999).

    Raises ValueError for ends that are not whole numbers, not ascending, out of range, or off the solver grid: a
    boundary off the grid is met by no training pair, so its boundary condition would never be learnt.
    `allow_off_grid` accepts those, for sampling with weights that were made for them.
    """

    boundary_timesteps: tuple[int, ...]
    start_timestep: int = 19
    num_solver_steps: int = 50
    num_train_timesteps: int = 1000
    allow_off_grid: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.boundary_timesteps, str):
            raise ValueError(
                f"boundary_timesteps {self.boundary_timesteps!r} is text; "
                "give whole numbers such as [0, 259, 519, 779, 999], or use Boundaries.parse"
            )
        ends = tuple(self.boundary_timesteps)
        ends = ends if ends[:1] == (0,) else (0, *ends)
        object.__setattr__(self, "boundary_timesteps", ends)
        steps, total = self.num_solver_steps, self.num_train_timesteps
        if not 1 <= steps <= total or total % steps:
            raise ValueError(f"num_solver_steps {steps} does not divide num_train_timesteps {total}; choose a divisor")
        self._check_ends()
        if not self.allow_off_grid:
            for end in ends[1:]:
                self._check_on_grid(end, "boundary")
            self._check_on_grid(self.start_timestep, "start_timestep")

    def _check_ends(self) -> None:
        ends, last = self.boundary_timesteps, self.num_train_timesteps - 1
        for end in ends:
            if not isinstance(end, int):
                raise ValueError(f"boundary {end!r} is not a whole number; give timesteps between 0 and {last}")
            if not 0 <= end <= last:
                raise ValueError(f"boundary {end} is out of range; give timesteps between 0 and {last}")
        for lower, upper in pairwise(ends):
            if lower == upper:
                raise ValueError(f"boundary {lower} appears twice; give each end once")
            if lower > upper:
                raise ValueError(f"boundary {upper} comes after {lower}; give the ends in ascending order")
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != last:
            raise ValueError(f"boundary_timesteps {list(ends)} must begin with 0 and end with {last}")
        if not isinstance(self.start_timestep, int) or not 0 < self.start_timestep < ends[1]:
            raise ValueError(
                f"start_timestep {self.start_timestep} is not inside the first segment, 0 to {ends[1]}; "
                "move it, or use fewer and longer segments"
            )

    def _check_on_grid(self, timestep: int, name: str) -> None:
        grid = self.solver_timesteps
        if timestep in grid:
            return
        above = bisect_left(grid, timestep)
        nearest = ", ".join(str(point) for point in grid[max(above - 1, 0) : above + 1])
        raise ValueError(
            f"{name} {timestep} is not on the {self.num_solver_steps}-step solver grid (nearest: {nearest}); "
            "move it there, or pass allow_off_grid=true"
        )

    @classmethod
    def uniform(cls, num_segments: int) -> "Boundaries":
        """Segments of ceil(50 / num_segments) grid points each, the last one taking the rest: the paper's default cut.

        Raises ValueError if that many segments would leave the last one empty.
        """
        grid = cls((cls.num_train_timesteps - 1,)).solver_timesteps
        if not 1 <= num_segments <= len(grid):
            raise ValueError(f"num_segments {num_segments} is out of range; choose between 1 and {len(grid)}")
        points = -(-len(grid) // num_segments)
        if points * (num_segments - 1) >= len(grid):
            raise ValueError(
                f"num_segments {num_segments} of {points} grid points leave nothing for the last; "
                f"choose {-(-len(grid) // points)} or give boundary_timesteps"
            )
        inner = [grid[points * k - 1] for k in range(1, num_segments)]
        return cls((0, *inner, grid[-1]))

    @classmethod
    def parse(cls, text: str, *, allow_off_grid: bool = False) -> "Boundaries":
        """Read upper boundaries, "259,519,779,999" or "259_519_779_999" as in released file names; 0 is implied.

        Raises ValueError for text that is not a list of whole numbers, and whatever the constructor refuses.
        """
        try:
            ends = tuple(int(word) for word in text.replace("_", ",").split(","))
        except ValueError:
            raise ValueError(f"boundaries {text!r} are not whole numbers; write them like 259,519,779,999") from None
        return cls(ends, allow_off_grid=allow_off_grid)

    @property
    def num_segments(self) -> int:
        """m: jumps, and so network evaluations, from one end of the time axis to the other."""
        return len(self.boundary_timesteps) - 1

    @cached_property
    def solver_timesteps(self) -> tuple[int, ...]:
        """The teacher's grid, ascending: 19, 39, ..., 999 for 50 steps of 1000."""
        stride = self.num_train_timesteps // self.num_solver_steps
        return tuple(range(stride - 1, self.num_train_timesteps, stride))

    @cached_property
    def jumps(self) -> dict[Direction, tuple[tuple[int, int], ...]]:
        """(t, s) of sampling, by direction: reverse (999, 779), ..., (259, 0); forward (19, 259), ..., (779, 999)."""
        ends = self.boundary_timesteps
        return {"reverse": tuple(pairwise(ends[::-1])), "forward": tuple(pairwise((self.start_timestep, *ends[1:])))}

    @cached_property
    def pairs(self) -> dict[Direction, TrainingPairs]:
        """Pairs to train a student by consistency, by its direction: down from each grid point, up from all but one.

        The boundary is the one beyond t_next, not beyond t: a student at a boundary trains for the next segment.
        """
        grid, ends = torch.tensor(self.solver_timesteps), torch.tensor(self.boundary_timesteps)
        down, up = torch.cat([ends[:1], grid[:-1]]), grid[1:]
        lower, upper = torch.searchsorted(ends, down, right=True) - 1, torch.searchsorted(ends, up)
        return {
            "reverse": TrainingPairs(grid, down, ends[lower], lower),
            "forward": TrainingPairs(grid[:-1], up, ends[upper], upper - 1),
        }

    @cached_property
    def trips(self) -> dict[Direction, RoundTrips]:
        """Round trips to train a student by preservation, by its direction, one for each segment.

        The forward student returns to each segment's upper end, the reverse student to the lower one. Both kinds turn
        at start_timestep instead of 0, where the forward student begins.
        """
        lower, upper = torch.tensor(self.jumps["forward"]).T
        segments = torch.arange(self.num_segments)
        return {"forward": RoundTrips(upper, lower, segments), "reverse": RoundTrips(lower, upper, segments)}

    def check_process(self, process: Process) -> None:
        """Raise ValueError if the process has another time axis than these."""
        if process.num_train_timesteps != self.num_train_timesteps:
            raise ValueError(
                f"boundaries on {self.num_train_timesteps} timesteps do not fit a process of "
                f"{process.num_train_timesteps}: give boundaries of num_train_timesteps {process.num_train_timesteps}"
            )
