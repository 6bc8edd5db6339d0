"""Random numbers of a training: a pure function of seed, step and sample, whoever owns the sample."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


class Draws:
    """Random numbers of one step, for the samples of this rank.

    Each sample has generators of its own, seeded by (seed, step, name of the stream, place in the joined batch of all
    ranks). So N processes draw what one process with the joined batch would draw, each no more than its share, and a
    resumed run draws what an unbroken one would have drawn. `of` names a stream: what one loss draws does not depend on
    which others there are.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        name: str = "",
    ) -> None:
        self.seed, self.step, self.name = seed, step, name
        self.rank, self.world_size, self.device = rank, world_size, device
        self._generators: list[torch.Generator] = []

    def of(self, name: str) -> "Draws":
        """The stream of this name, at its beginning."""
        stream = copy.copy(self)
        stream.name, stream._generators = f"{self.name}/{name}", []
        return stream

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32; the first dimension is this rank's batch size."""
        return self._each(shape[0], partial(torch.randn, shape[1:]))

    def integers(self, count: int, high: int) -> Tensor:
        """Uniform over 0 ... high - 1, long (count,)."""
        return self._each(count, partial(torch.randint, high, ()))

    def uniform(self, count: int) -> Tensor:
        """Uniform over [0, 1), float32 (count,)."""
        return self._each(count, partial(torch.rand, ()))

    def choice(self, count: int, values: Sequence[float]) -> Tensor:
        """One of `values` for each sample, float32 (count,)."""
        options = torch.tensor(list(values), dtype=torch.float32, device=self.device)
        return options[self.integers(count, len(options))]

    def _each(self, count: int, draw: Callable[..., Tensor]) -> Tensor:
        """Draw for each sample, on the CPU: the same numbers on any device."""
        if not self._generators:
            first = self.rank * count
            self._generators = [torch.Generator().manual_seed(self._seed(first + i)) for i in range(count)]
        if len(self._generators) != count:
            raise ValueError(f"{count} samples in a stream of {len(self._generators)}: a stream is of one batch")
        drawn = [draw(generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(self.device, non_blocking=True)

    def _seed(self, place: int) -> int:
        key = f"{self.seed}/{self.step}/{self.name}/{place}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 2**63
