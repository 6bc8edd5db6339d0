"""Metrics that need a pretrained network: LPIPS, DinoV2 similarity, FID. Images are (B, 3, H, W) in [-1, 1].

The networks are the real ones or none: they are read from the folder `ICD_METRICS_HOME`, else from the caches in which
torch.hub and the Hugging Face hub keep what they have fetched, and nothing is ever downloaded. Under ICD_METRICS_HOME:

    vgg16-397923af.pth                            torchvision's VGG16, for LPIPS; its linear heads come with `lpips`
    dinov2-base/                                  facebook/dinov2-base: config.json, model.safetensors,
                                                  preprocessor_config.json
    pt_inception-2015-12-05-6726825d.pth          the 2015 Inception network, for FID
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.functional import center_crop, resize

from icd_lightning.data.images import quantize
from icd_lightning.data.manifest import sha256

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/pt_inception-2015-12-05-6726825d.pth"
DINOV2 = "facebook/dinov2-base"
WITHOUT = "or go without, e.g. metrics: [psnr, ssim]"


class LPIPS(MeanMetric):
    """Mean LPIPS distance (Zhang et al., arXiv:1801.03924) over images, with distance = network(a, b), (B, 1, 1, 1).

    As in iCD's evaluation: images in [0, 1], not the [-1, 1] of the LPIPS paper, resized to 224 pixels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, images: Tensor, reference: Tensor) -> None:
        pairs = (_square(quantize(x) / 255, 224) for x in (images, reference))
        super().update(self.network(*pairs).flatten())


class DinoV2Similarity(MeanMetric):
    """Mean cosine of DinoV2's `pooler_output` over pairs of images, each prepared by the model's own processor."""

    def __init__(self) -> None:
        super().__init__()
        self.processor, self.network = _load_dinov2()

    @torch.no_grad()
    def update(self, images: Tensor, reference: Tensor) -> None:
        super().update(torch.cosine_similarity(self._embed(images), self._embed(reference)))

    def _embed(self, images: Tensor) -> Tensor:
        pixels = self.processor(images=list(quantize(images).byte()), return_tensors="pt")["pixel_values"]
        return self.network(pixels.to(images.device)).pooler_output


class FID(FrechetInceptionDistance):
    """Frechet distance between images' and references' features (Heusel et al., arXiv:1706.08500), on 8-bit values."""

    def update(self, images: Tensor, reference: Tensor) -> None:
        super().update(quantize(reference).byte(), real=True)
        super().update(quantize(images).byte(), real=False)


def lpips() -> LPIPS:
    """LPIPS with VGG16. FileNotFoundError, with what to fetch, where its weights are not on this machine."""
    return LPIPS(_lpips_vgg16(_load(_find(VGG16_URL, "lpips"))))


def fid() -> FID:
    """FID with the 2015 Inception network. FileNotFoundError, with what to fetch, where there is none."""
    weights = _find(INCEPTION_URL, "fid")
    if find_spec("torch_fidelity") is None:
        raise ValueError(f"metric fid needs the package torch-fidelity: pip install torch-fidelity, {WITHOUT}")
    return FID(feature_extractor_weights_path=str(weights))


def _square(images: Tensor, size: int) -> Tensor:
    """Short side resized to `size`, centre cut out: never stretched."""
    return center_crop(resize(images, [size], antialias=True), [size])


def _lpips_vgg16(vgg16: dict[str, Tensor]) -> nn.Module:
    """lpips' network with its own heads and torchvision's trunk, built without weights, so that none stays random."""
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's, about the arguments that lpips gives it
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    # sliceN.<i>.weight is torchvision's features.<i>.weight
    trunk = {f"net.{name}": vgg16[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
    heads = _load(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
    network.scaling_layer = lpips.ScalingLayer()  # constants
    network.load_state_dict(trunk | heads, strict=False, assign=True)  # `lins` is `lin0` ... once more
    assert not any(value.is_meta for value in network.state_dict().values())
    return network


def _load(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _load_dinov2() -> tuple[Any, nn.Module]:
    from transformers import AutoImageProcessor, AutoModel

    folder = _home() / "dinov2-base" if _home() else None
    source = folder if folder and folder.is_dir() else DINOV2
    try:
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=True)
        network = AutoModel.from_pretrained(source, local_files_only=True)
    except OSError as error:
        raise _missing("dinov2", f"{DINOV2} (hf download {DINOV2})", "dinov2-base/") from error
    return processor, network.requires_grad_(False).eval()


def _find(url: str, metric: str) -> Path:
    """The URL's file in ICD_METRICS_HOME or torch.hub's cache; its name ends in its own SHA-256, which must fit."""
    name = url.rsplit("/", 1)[1]
    folders = [*filter(None, [_home()]), Path(torch.hub.get_dir()) / "checkpoints"]
    file = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if file is None:
        raise _missing(metric, url, name)
    if not (digest := sha256(file)).startswith(file.stem.rsplit("-", 1)[1]):
        raise ValueError(f"{file} is damaged or not what its name says (SHA-256 {digest[:8]}); fetch {url} again")
    return file


def _home() -> Path | None:
    folder = os.environ.get("ICD_METRICS_HOME")
    return Path(folder) if folder else None


def _missing(metric: str, source: str, name: str) -> FileNotFoundError:
    place = _home() or "a folder named by ICD_METRICS_HOME"
    return FileNotFoundError(f"metric {metric} lacks its network: put {source} as {name} into {place}, {WITHOUT}")
