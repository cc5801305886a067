"""Sizes, shapes and gradients of embedder, generator and discriminator."""

from dataclasses import replace

import pytest
import torch

from model import PAPER, PRESETS, SMALL, TINY, Discriminator, Embedder, Generator, ModelConfig
from model.blocks import sum_pool

# Every axis of these differs from every other, so that no transposition goes unseen.
BATCH, SHOTS, HEIGHT, WIDTH = 2, 3, 32, 48
MINIATURE = ModelConfig(
    image_px=32,
    min_channels=8,
    max_channels=24,
    bottleneck_px=8,
    num_middle=1,
    attention_down_px=8,
    attention_up_px=16,
)


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1


def build(network: type, config: ModelConfig = MINIATURE, seed: int = 0):
    torch.manual_seed(seed)
    return network(config)


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def open_attention(network: torch.nn.Module) -> None:
    """Self-attention starts closed, with no gradient behind its gain."""
    for name, parameter in network.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.5)


def test_paper_has_the_papers_parameters():
    with torch.device("meta"):
        networks = {name: name(PAPER) for name in (Embedder, Generator, Discriminator)}
    assert num_parameters(networks[Embedder]) == 14_907_265
    assert num_parameters(networks[Generator]) == 38_073_925
    assert num_parameters(networks[Discriminator]) == 19_627_394
    assert networks[Generator].psi_dim == 13_056
    assert num_parameters(networks[Generator].P) == 13_056 * 512 + 13_056


def test_paper_has_the_papers_maps():
    assert PAPER.trunk_widths == (64, 128, 256, 512, 512, 512)
    assert PAPER.down_widths == (64, 128, 256, 512)
    assert PAPER.up_widths == (512, 256, 128, 64)
    assert PAPER.embedding_dim == 512
    assert PAPER.trunk_widths[PAPER.attention_level_down] == 256
    assert PAPER.up_widths[PAPER.attention_level_up] == 256


@pytest.mark.parametrize("config", [SMALL, TINY], ids=["small", "tiny"])
def test_presets_take_their_own_size(config: ModelConfig):
    torch.manual_seed(0)
    y = torch.rand(1, 3, config.image_px, config.image_px) * 2 - 1
    generator, embedder, discriminator = Generator(config), Embedder(config), Discriminator(config)
    e = embedder(y[:, None], y[:, None])
    x_hat = generator(y, generator.psi(e))
    r, features = discriminator(x_hat, y, torch.zeros_like(e))
    assert x_hat.shape == y.shape
    assert r.shape == (1,)
    assert features[-1].shape[2:] == (config.pool_px, config.pool_px)


def test_every_network_takes_pictures_that_are_not_square():
    embedder, generator = build(Embedder), build(Generator)
    discriminator = build(Discriminator)
    e = embedder(picture(BATCH, SHOTS), picture(BATCH, SHOTS, seed=1))
    psi = generator.psi(e)
    x_hat = generator(picture(BATCH), psi)
    r, features = discriminator(x_hat, picture(BATCH), torch.zeros_like(e))
    assert e.shape == (BATCH, 24)
    assert psi.shape == (BATCH, generator.psi_dim)
    assert x_hat.shape == (BATCH, 3, HEIGHT, WIDTH)
    assert x_hat.abs().max() <= 1
    assert r.shape == (BATCH,)
    assert [tuple(layer.shape) for layer in features] == [
        (BATCH, 8, 16, 24),
        (BATCH, 16, 8, 12),
        (BATCH, 24, 4, 6),
        (BATCH, 24, 4, 6),
    ]


def test_a_size_the_blocks_cannot_halve_is_refused():
    with pytest.raises(ValueError, match=r"30 x 48 pixels came, expected multiples of 8"):
        build(Embedder)(picture(1, 1)[..., :30, :], picture(1, 1)[..., :30, :])
    with pytest.raises(ValueError, match=r"32 x 46 pixels came, expected multiples of 4"):
        generator = build(Generator)
        generator(picture(1)[..., :46], torch.zeros(1, generator.psi_dim))


def test_the_embedding_is_the_mean_over_frames():
    embedder = build(Embedder).eval()
    x, y = picture(BATCH, SHOTS), picture(BATCH, SHOTS, seed=1)
    each = torch.stack([embedder(x[:, [k]], y[:, [k]]) for k in range(SHOTS)])
    torch.testing.assert_close(embedder(x, y), each.mean(dim=0))


def test_the_embedding_sums_over_space():
    embedder = build(Embedder).eval()
    once = embedder(picture(1, 1), picture(1, 1))
    small = picture(1, 1)[..., :16]
    doubled = torch.cat([small] * 8, dim=-1)
    # Far from the borders a repeated pattern repeats in the map: the sum grows with the area.
    ratio = embedder(doubled, doubled).norm() / embedder(small, small).norm()
    assert once.min() >= 0
    assert 6 < ratio < 10


def test_frames_and_rasters_are_not_interchangeable():
    embedder, discriminator = build(Embedder).eval(), build(Discriminator).eval()
    x, y = picture(1), picture(1, seed=1)
    assert not torch.allclose(embedder(x[None], y[None]), embedder(y[None], x[None]))
    w_i = torch.ones(1, 24)
    assert not torch.allclose(discriminator(x, y, w_i)[0], discriminator(y, x, w_i)[0])


def test_psi_holds_beta_then_gamma_of_every_norm_in_the_order_of_the_flow():
    generator = build(Generator)
    # One middle block of 16 channels, then up blocks 16 -> 16 -> 8, then the last norm.
    assert generator.psi_sizes == (32, 32, 32, 32, 32, 16, 16)
    assert generator.psi_dim == sum(generator.psi_sizes)
    psi = generator.psi(torch.zeros(1, 24))[0]
    for part in psi.split(generator.psi_sizes):
        beta, gamma = part.chunk(2)
        assert beta.eq(0).all()
        assert gamma.eq(1).all()


def test_each_coefficient_of_psi_reaches_the_picture():
    generator = build(Generator).eval()
    psi = generator.psi(torch.ones(1, 24)).detach().requires_grad_()
    generator(picture(1), psi).square().sum().backward()
    assert psi.grad is not None
    for part in psi.grad[0].split(generator.psi_sizes):
        assert all(half.abs().sum() > 0 for half in part.chunk(2))


def test_the_last_gamma_scales_the_last_norm():
    generator = build(Generator).eval()
    psi = generator.psi(torch.ones(1, 24)).detach()
    psi[:, -16:] = 0  # beta and gamma of the norm before the last convolution
    flat = generator(picture(1), psi)
    torch.testing.assert_close(
        flat, torch.tanh(generator.last.bias).view(1, 3, 1, 1).expand_as(flat)
    )


def test_landmarks_pass_where_the_embedding_is_zero():
    """The generator of the field's best known failure shows one constant tile instead."""
    generator = build(Generator).eval()
    x_hat = generator(picture(BATCH), generator.psi(torch.zeros(BATCH, 24)))
    tiles = x_hat.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2)
    assert tiles.std(dim=-1).min() > 1e-3
    assert (x_hat[0] - x_hat[1]).abs().mean() > 1e-3


def test_the_score_is_linear_in_the_row():
    """r = v . (w_i + w0) + b: a fine-tuned w' = w0 + e is scored like a row w_i = e."""
    discriminator = build(Discriminator).eval()
    x, y = picture(BATCH), picture(BATCH, seed=1)
    w_i = torch.randn(BATCH, 24, generator=torch.Generator().manual_seed(2))
    score = lambda row: discriminator(x, y, row)[0]  # noqa: E731
    zero = score(torch.zeros_like(w_i))
    torch.testing.assert_close(score(3 * w_i) - zero, 3 * (score(w_i) - zero), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        score(-discriminator.w0.expand_as(w_i)), discriminator.b.expand(BATCH)
    )


def test_the_score_gain_multiplies_the_score_alone():
    scores = {}
    for gain in (1.0, 5.0):
        discriminator = build(Discriminator, replace(MINIATURE, score_gain=gain)).eval()
        torch.nn.init.constant_(discriminator.b, 0.25)
        scores[gain] = discriminator(picture(1), picture(1), torch.ones(1, 24))[0]
    torch.testing.assert_close(scores[5.0] - 0.25, 5 * (scores[1.0] - 0.25))


def test_every_parameter_gets_a_gradient():
    embedder, generator, discriminator = (build(n) for n in (Embedder, Generator, Discriminator))
    for network in (embedder, generator, discriminator):
        open_attention(network)
    y = picture(BATCH, seed=1)
    e = embedder(picture(BATCH, SHOTS), picture(BATCH, SHOTS, seed=1))
    r, _ = discriminator(generator(y, generator.psi(e)), y, e)
    r.square().sum().backward()
    for network in (embedder, generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("network", [Embedder, Generator, Discriminator])
def test_state_goes_through_a_file_and_back(network: type, tmp_path):
    first, second = build(network, seed=0), build(network, seed=1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_orthogonal_weights_start_without_bias():
    discriminator = build(Discriminator, replace(MINIATURE, discriminator_init="orthogonal"))
    assert all(
        bias.eq(0).all() for name, bias in discriminator.named_parameters() if "bias" in name
    )
    matrix = discriminator.blocks[1].conv1.weight.detach().flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_their_pictures(name: str):
    assert PRESETS[name].image_px == {"paper": 256, "small": 128, "tiny": 64}[name]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("image_px", 100, "image_px is 100, expected a power of two"),
        ("pool_px", 64, "pool_px is 64, expected below image_px"),
        ("attention_down_px", 4, "attention_down_px is 4, expected at least 8"),
        ("attention_up_px", 8, "attention_up_px is 8, expected above bottleneck_px"),
        ("min_channels", 12, "min_channels is 12, expected a multiple of 8"),
        ("max_channels", 8, "max_channels is 8, expected a multiple of 8, not below"),
        ("num_middle", 0, "num_middle is 0, expected at least 1"),
        ("score_gain", 0.0, "score_gain is 0.0, expected above 0"),
    ],
)
def test_settings_that_make_no_network_are_refused(setting: str, value: float, message: str):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **{setting: value})


def test_orthogonal_start_lets_the_discriminator_see_a_blur():
    """With PyTorch's own start, biases drown what spectral norm leaves of the picture."""
    torch.manual_seed(0)
    sharp, raster = torch.rand(2, 3, 64, 64) * 2 - 1, torch.zeros(2, 3, 64, 64)
    blurred = torch.nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2)
    seen = {}
    for init in ("default", "orthogonal"):
        discriminator = build(Discriminator, replace(TINY, discriminator_init=init)).eval()
        _, sharp_features = discriminator(sharp, raster, torch.zeros(2, 128))
        _, blurred_features = discriminator(blurred, raster, torch.zeros(2, 128))
        seen[init] = (sum_pool(sharp_features[-1]) - sum_pool(blurred_features[-1])).abs().mean()
    assert seen["orthogonal"] > 5 * seen["default"]
