"""LatentAutoencoder adds the scaling of a config to diffusers' autoencoders, and nothing else."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from family_case import VAE
from torch import Tensor, nn

from icd_lightning.models.autoencoder import LatentAutoencoder


def build_kl(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[4, 8, 8],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        norm_num_groups=4,
        **config,
    )
    nn.init.normal_(vae.quant_conv.bias, std=0.3)  # a mean and a variance worth the name
    return vae


def build_dc(**config) -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC.from_config(VAE | config)


BUILDERS = {"kl": build_kl, "dc": build_dc}


@pytest.fixture
def images() -> Tensor:
    return 2 * torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) - 1


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "channels", "downsampling"), [("kl", 4, 4), ("dc", 16, 8)])
def test_shapes(images, kind, channels, downsampling):
    autoencoder = LatentAutoencoder(BUILDERS[kind]())
    latents = autoencoder.encode(images)
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (channels, downsampling)
    assert latents.shape == (2, channels, 32 // downsampling, 24 // downsampling)
    assert autoencoder.decode(latents).shape == images.shape


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"scaling_factor": 0.5}, {"scaling_factor": 0.5, "shift_factor": 0.25}])
def test_the_posteriors_mean_is_shifted_and_scaled(images, config):
    vae = build_kl(**config)
    autoencoder = LatentAutoencoder(vae)
    shift, scale = config.get("shift_factor", 0.0), config.get("scaling_factor", 0.18215)
    mean = vae.encode(images).latent_dist.mean
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, (mean - shift) * scale)
    torch.testing.assert_close(autoencoder.decode(latents), vae.decode(mean).sample.clamp(-1, 1))


@torch.no_grad()
def test_a_draw_is_the_posteriors_with_the_noise_it_is_given(images):
    vae = build_kl()
    autoencoder = LatentAutoencoder(vae)
    posterior = vae.encode(images).latent_dist
    drawn = autoencoder.encode(images, normal=noise)
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise(*posterior.mean.shape)) * 0.18215)
    expected = posterior.sample(torch.Generator().manual_seed(1)) * vae.config.scaling_factor  # diffusers' own draw
    torch.testing.assert_close(drawn, expected)
    assert torch.equal(autoencoder.encode(images, normal=lambda *shape: torch.zeros(shape)), autoencoder.encode(images))
    assert not torch.allclose(drawn, autoencoder.encode(images), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_an_autoencoder_without_posterior_asks_for_no_noise(images, scale):
    vae = build_dc(scaling_factor=scale)
    autoencoder = LatentAutoencoder(vae)
    latent = vae.encode(images).latent
    assert torch.equal(autoencoder.encode(images), latent * scale)
    assert torch.equal(autoencoder.encode(images, normal=pytest.fail), latent * scale)
    torch.testing.assert_close(autoencoder.decode(latent * scale), vae.decode(latent).sample.clamp(-1, 1))


@pytest.mark.parametrize("kind", BUILDERS)
def test_it_is_frozen_whatever_is_done_to_the_model_around_it(images, kind):
    autoencoder = LatentAutoencoder(BUILDERS[kind]())
    around = nn.ModuleList([autoencoder]).train()
    assert around.training
    assert not any(module.training for module in autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert not autoencoder.decode(autoencoder.encode(images.requires_grad_())).requires_grad


@pytest.mark.parametrize("kind", BUILDERS)
def test_gradients_reach_what_is_given_on_request(images, kind):
    autoencoder = LatentAutoencoder(BUILDERS[kind]())
    images.requires_grad_()
    latents = autoencoder.encode(images, normal=noise, gradients=True)
    assert torch.equal(latents, autoencoder.encode(images, normal=noise))
    autoencoder.decode(latents, gradients=True).sum().backward()
    assert images.grad.norm() > 0
    assert all(parameter.grad is None for parameter in autoencoder.parameters())
    # along the gradient, the sum of the latents changes as the gradient says
    (gradient,) = torch.autograd.grad(autoencoder.encode(images, gradients=True).sum(), images)
    step = 1e-3 * gradient / gradient.norm()
    change = (autoencoder.encode(images + step) - autoencoder.encode(images)).double().sum()
    assert change.item() == pytest.approx((gradient * step).sum().item(), rel=0.05)
    with torch.no_grad():
        assert not autoencoder.decode(latents, gradients=True).requires_grad


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_network_in_half_precision_takes_and_gives_the_type_it_is_asked_in(images, kind):
    whole, half = LatentAutoencoder(BUILDERS[kind]()), LatentAutoencoder(BUILDERS[kind]().bfloat16())
    latents = half.encode(images, normal=noise)
    assert latents.dtype == half.decode(latents).dtype == torch.float32
    torch.testing.assert_close(latents, whole.encode(images, normal=noise), atol=0.05, rtol=0.05)


def test_pictures_are_clamped():
    decoded = LatentAutoencoder(build_dc()).decode(1e3 * noise(1, 16, 2, 2))
    assert decoded.min() == -1
    assert decoded.max() == 1


@pytest.mark.parametrize(("kind", "multiple"), [("kl", 4), ("dc", 8)])
@pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 30), (3, 8)])
def test_sides_that_do_not_divide_are_refused(kind, multiple, height, width):
    with pytest.raises(
        ValueError, match=f"{height} x {width} pixels: both sides must be multiples of {multiple}; crop"
    ):
        LatentAutoencoder(BUILDERS[kind]()).encode(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("kind", BUILDERS)
def test_moments_kept_on_disk_give_the_latents_that_encoding_gives(images, kind):
    autoencoder = LatentAutoencoder(BUILDERS[kind]())
    moments = autoencoder.moments(images)
    for normal in (None, noise):
        assert torch.equal(autoencoder.sample(moments, normal=normal), autoencoder.encode(images, normal=normal))


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_fingerprint_tells_other_weights_but_not_another_precision(kind):
    fingerprint = LatentAutoencoder(BUILDERS[kind]()).fingerprint
    for dtype in (torch.float16, torch.bfloat16):
        assert LatentAutoencoder(BUILDERS[kind]().to(dtype)).fingerprint == fingerprint
    other = BUILDERS[kind]()
    nn.init.normal_(next(other.encoder.parameters()))
    assert LatentAutoencoder(other).fingerprint != fingerprint
