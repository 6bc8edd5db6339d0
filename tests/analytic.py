"""Denoisers known in closed form, for laws that trained networks obey only roughly."""

from dataclasses import dataclass

from torch import Tensor

from icd_lightning.diffusion import Process, Split


@dataclass(frozen=True)
class PointMass:
    """All data is x0 (C, H, W): the noise in x is known exactly, paths are straight in eps, and DDIM is exact."""

    x0: Tensor
    process: Process

    def __call__(self, x: Tensor, t: Tensor) -> Split:
        return Split(self.x0.expand_as(x), self.process.eps_from_x0(x, self.x0, t))


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2) in every dimension: curved paths along which (x - alpha mean) / spread is constant."""

    mean: float
    std: float
    process: Process

    def __call__(self, x: Tensor, t: Tensor) -> Split:
        alpha, sigma = (part(t, set_alpha_to_one=False) for part in (self.process.alpha, self.process.sigma))
        away = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        return Split(self.mean + alpha * self.std**2 * away, sigma * away)

    def transport(self, x: Tensor, t: int, s: int) -> Tensor:
        """Where the probability flow ODE takes x (B, C, H, W) from t to s, both read from the table."""
        return self._mean(s) + (x - self._mean(t)) * self._spread(s) / self._spread(t)

    def _mean(self, t: int) -> Tensor:
        return self.process.alpha(t, set_alpha_to_one=False) * self.mean

    def _spread(self, t: int) -> Tensor:
        alpha, sigma = (part(t, set_alpha_to_one=False) for part in (self.process.alpha, self.process.sigma))
        return (alpha**2 * self.std**2 + sigma**2).sqrt()
