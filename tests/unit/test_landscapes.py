"""The renderer of landscapes and the independent check of images, tested on each other."""

import numpy as np

from demo.check import scene_prompts, shows, shuffled_share
from demo.landscapes import EXTRAS, PLACES, TIMES, caption, random_scene, render

PROMPTS = scene_prompts()
SCENES = [scene for _, scene in PROMPTS]


def test_forty_prompts_cover_every_place_and_hour() -> None:
    assert len(PROMPTS) == 40
    assert {(s.place, s.time) for s in SCENES} == {(p, t) for p in PLACES for t in TIMES}


def test_rendered_scenes_pass_the_check_and_shuffled_ones_fail() -> None:
    rng = np.random.default_rng(0)
    images = [render(scene, 96, 96, rng) for scene in SCENES]
    passed = [shows(image, scene) for image, scene in zip(images, SCENES, strict=True)]
    assert np.mean(passed) >= 0.95
    assert shuffled_share(images, SCENES) < 0.05


def test_noise_and_flat_images_show_no_scene() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    flats = [Image.new("RGB", (128, 128), c) for c in ("black", "white", "grey", "navy")]
    assert not any(shows(p, s) for p in [noise, *flats] for s in SCENES)


def test_captions_name_the_scene_in_many_wordings() -> None:
    rng = np.random.default_rng(0)
    texts = set()
    for _ in range(300):
        scene = random_scene(rng)
        text = caption(scene, rng)
        texts.add(text)
        assert any(word in text for word in PLACES[scene.place])
        assert any(word.removeprefix("a ") in text for word in TIMES[scene.time])
        absent = EXTRAS.keys() - scene.extras - {"lake"}
        assert not any(word in text for extra in absent for word in EXTRAS[extra])
    assert len(texts) > 280


def test_the_same_seed_renders_the_same_image() -> None:
    scene = SCENES[0]
    one, same, other = (
        np.asarray(render(scene, 96, 64, np.random.default_rng(seed))) for seed in (1, 1, 2)
    )
    assert one.shape == (64, 96, 3)
    assert (one == same).all()
    assert (one != other).any()
