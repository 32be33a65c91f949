"""Views of images for contrastive learning."""

import numpy as np
import torch

from hf_ntp.data import RandomView

STILL = {"smallest_crop": 1.0, "rotation": 0.0, "jitter": 0.0, "invert": 0.0, "blur": 0.0, "noise": 0.0}


def view(images, seed=0, **options):
    return RandomView(**{**STILL, **options})(images, np.random.default_rng(seed))


def images(count=6):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_nothing_changes_where_nothing_may():
    assert torch.allclose(view(images()), images(), atol=1e-5)


def test_the_generator_decides_everything():
    views = [RandomView()(images(), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    same = images()[:1].expand(2, -1, -1, -1)
    first, second = RandomView()(same, np.random.default_rng(0))
    assert not torch.allclose(first, second), "every image has a draw of its own"


def test_light_and_dark_are_exchanged_within_the_range_of_the_image():
    one = images(1)
    low, high = one.min(), one.max()
    assert torch.allclose(view(one, invert=1.0), low + high - one, atol=1e-5)


def test_a_crop_is_a_part_of_the_image():
    """A crop of a ramp is a ramp of a smaller slope, inside the range of the whole."""
    ramp = torch.arange(8.0).expand(4, 3, 8, 8)
    cropped = view(ramp, smallest_crop=0.5)
    assert (cropped >= 0).all()
    assert (cropped <= 7).all()
    slopes = cropped[..., 1:-1].diff(dim=-1).mean((1, 2, 3))
    assert ((slopes >= 0.5 - 1e-4) & (slopes < 1)).all()


def test_brightness_and_contrast_are_in_units_of_the_image():
    dim, bright = images(), 10 * images() + 3
    assert torch.allclose(view(bright, jitter=0.5, noise=0.2), 10 * view(dim, jitter=0.5, noise=0.2) + 3, atol=1e-3)


def test_blur_keeps_flat_images_and_smooths_others():
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(view(flat, blur=1.0), flat, atol=1e-5)
    assert view(images(), blur=1.0).std() < 0.6 * images().std()
