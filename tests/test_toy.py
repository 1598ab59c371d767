"""The toy world: samples that are a function of their number, in the paper's proportions and in two
splits; what captions may say; a judge that is exact; a tokenizer that loses nothing.
"""

import re
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

import iccot
from runtime.pretrained import load_tokenizer
from toy import tasks, world
from toy.judge import Verdict, judge, nearest_subjects
from toy.tasks import draw_sample
from toy.tokenizer import SPECIAL_TOKENS, train_tokenizer

PINNED = (
    "A robot in yellow (the first image) at the top left, in a city.",
    "A city with a robot in yellow at the top left.",
)


@pytest.fixture(scope="module")
def samples():
    return [draw_sample("train", index) for index in range(1500)]


@pytest.fixture(scope="module")
def held_out():
    return [draw_sample("held_out", index) for index in range(1500)]


def with_thing(truth, index, **fields):
    """The truth with some fields of one thing's subject changed."""
    things = list(truth.things)
    things[index] = replace(things[index], subject=replace(things[index].subject, **fields))
    return replace(truth, things=tuple(things))


# --------------------------------------------------------------------------------------------------
# samples


def as_bytes(sample):
    pictures = [picture.tobytes() for picture in sample.references + (sample.target,)]
    return sample.key, sample.task, sample.instruction, sample.plan, sample.truth, pictures


def test_a_sample_is_a_function_of_its_arguments():
    first = [as_bytes(draw_sample("train", index, seed=3)) for index in range(20)]
    again = [as_bytes(draw_sample("train", index, seed=3)) for index in reversed(range(20))][::-1]
    assert first == again
    assert len({sample[0] for sample in first}) == 20
    assert first != [as_bytes(draw_sample("train", index, seed=4)) for index in range(20)]
    # these words were written down once: the data of a published run must never change silently
    sample = draw_sample("train", 0)
    assert (sample.instruction, sample.plan.caption) == PINNED


def test_tasks_come_in_the_proportions_of_the_paper(samples, held_out):
    assert sum(iccot.TASKS.values()) == pytest.approx(100)
    count = Counter(sample.task for sample in samples + held_out)
    for task, share in iccot.TASKS.items():
        error = (share * (100 - share) / 3000) ** 0.5  # of a binomial share, in per cent
        assert abs(count[task] / 30 - share) < 4 * error, task


def test_pictures_and_number_of_references(samples):
    assert {len(sample.references) for sample in samples} == {1, 2, 3, 4}
    for sample in samples:
        assert sample.target.mode == "RGB" and sample.target.size == (32, 32)
        assert np.array_equal(np.asarray(sample.target), world.draw(sample.truth))
        for image in sample.references:
            assert image.mode == "RGB" and image.size in ((16, 16), (32, 32))
        if sample.task in ("add", "replace", "attribute", "scene"):
            assert sample.references[0].size == (32, 32)


@pytest.mark.parametrize("most", [2, 3, 6, 9])
def test_max_references(most):
    drawn = [draw_sample("train", index, max_references=most) for index in range(600)]
    counts = {len(sample.references) for sample in drawn}
    # nine are rare: four objects, each with a pattern
    assert max(counts) == most if most < 9 else max(counts) > 6
    for sample in drawn[:60]:
        references = len(sample.references)
        assert iccot.parse(iccot.render(sample.plan), references=references) == sample.plan
        assert judge(sample.target, sample.truth).overall == 10


def test_plans_round_trip_and_match_the_references(samples, held_out):
    for sample in samples + held_out:
        references = len(sample.references)
        assert iccot.parse(iccot.render(sample.plan), references=references) == sample.plan
        for number, relation in enumerate(sample.plan.relations, 1):
            assert relation.endswith(f"image_{number}.")
        assert sample.plan.caption == tasks.caption(sample.truth)
        looks = sample.truth.things[0].subject.looks + sample.truth.scene.looks
        assert not set(looks) - {"left", "right"} & set(sample.plan.caption.split())


def test_a_bad_split_or_number_is_refused():
    with pytest.raises(ValueError, match="'test' does not exist; choose from train, held_out"):
        draw_sample("test", 0)
    with pytest.raises(ValueError, match="max_references=1 is outside 2 to 10"):
        draw_sample("train", 0, max_references=1)


def test_references_and_instruction_determine_the_picture_of_a_composition(samples):
    """Read independently: relations give the order, the text the places (or the fixed rule), and
    the portraits the subjects."""
    tasks_read = ("subject", "subject_composition", "scene_composition")
    compositions = [sample for sample in samples if sample.task in tasks_read]
    assert len(compositions) > 500
    for sample in compositions:
        found = [re.match(r"The (\w+) is from", one) for one in sample.plan.relations]
        kinds = [match[1] for match in found if match]
        places = re.findall(r"at the ((?:top|bottom) (?:left|right))", sample.instruction)
        places = places or world.DEFAULT_PLACES[: len(kinds)]
        subject_at = {thing.place: thing.subject for thing in sample.truth.things}
        assert {place: subject.kind for place, subject in subject_at.items()} == dict(
            zip(places, kinds)
        )
        for place, image in zip(places, sample.references):
            rgb, silhouette = world.sprite(subject_at[place])
            assert np.array_equal(np.asarray(image)[silhouette], rgb[silhouette])
        if sample.task == "scene_composition":
            scene = np.asarray(sample.references[-1])
            assert np.array_equal(scene, world.scene_picture(sample.truth.scene))
        else:
            assert f" a {sample.truth.scene.kind}" in sample.instruction


def test_an_edit_keeps_the_rest_of_the_source(samples):
    for sample in samples:
        if sample.task in ("add", "replace", "attribute"):
            before, after = np.asarray(sample.references[0]), np.asarray(sample.target)
            changed = (before != after).any(-1)  # (32, 32)
            places = changed.reshape(2, 16, 2, 16).any((1, 3)).sum()
            assert places == (len(sample.references) - 1 if sample.task == "add" else 1)
            assert changed.sum() >= 6 or sample.task != "attribute"


# --------------------------------------------------------------------------------------------------
# splits


def test_no_held_out_subject_is_ever_seen_in_training(samples, held_out):
    seen = {thing.subject for sample in samples for thing in sample.truth.things}
    new = {thing.subject for sample in held_out for thing in sample.truth.things}
    assert len(seen) > 1000 and len(new) > 250 and not seen & new
    assert {world.split_of(subject) for subject in seen} == {"train"}
    assert {world.split_of(subject) for subject in new} == {"held_out"}
    assert not {s.truth.scene for s in samples} & {s.truth.scene for s in held_out}


def test_reference_pictures_respect_the_split(samples, held_out):
    """Portraits are looked up by pixels, so that pattern owners and replaced things count too."""

    def portraits(some):
        pictures = [image for sample in some for image in sample.references]
        return {image.tobytes() for image in pictures if image.size == (16, 16)}

    def scenes(some):
        with_scene = [one for one in some if one.task in ("scene", "scene_composition")]
        return {sample.references[-1].tobytes() for sample in with_scene}

    assert not portraits(samples) & portraits(held_out)
    assert scenes(samples) and scenes(held_out) and not scenes(samples) & scenes(held_out)


def test_the_split_by_identity():
    train = [subject for subject in world.subjects() if world.split_of(subject) == "train"]
    assert len(world.subjects()) == 6 * 6 * 36 + 8 * 6 * 12
    assert len(train) / len(world.subjects()) == pytest.approx(5 / 6, abs=0.02)
    every = product(world.CHARACTERS + world.OBJECTS, world.COLOURS)
    assert {(subject.kind, subject.colour) for subject in train} == set(every)
    for split in world.SPLITS:
        scenes = [one for one in world.scenes() if world.split_of(one) == split]
        assert {scene.kind for scene in scenes} == set(world.SCENES)


# --------------------------------------------------------------------------------------------------
# drawing and words


def test_every_identity_looks_different():
    """Each hidden look changes at least six pixels of every kind, and each colour far more."""
    for wanted in product(world.CHARACTERS + world.OBJECTS, ("red", "pink")):
        group = [one for one in world.subjects() if (one.kind, one.colour) == wanted]
        drawn = np.stack([world.sprite(subject)[0] for subject in group])  # (n, 16, 16, 3)
        differ = (drawn[:, None] != drawn[None]).any(-1).sum((-1, -2))  # (n, n)
        differ += 256 * np.eye(len(group), dtype=int)
        assert differ.min() >= 6, (group[differ.min(1).argmin()], differ.min())
    red = world.Subject("man", "red", ("black", "tan", "none"))
    assert (world.sprite(red)[0] != world.sprite(replace(red, colour="blue"))[0]).any(-1).sum() > 30


def test_wrong_captions_change_one_fact(samples):
    rng = np.random.default_rng(0)
    changed = Counter()
    for sample in samples[:300]:
        right = facts(sample.plan.caption)
        wrong = tasks.wrong_captions(sample.truth, rng, 5)
        assert len(set(wrong)) == 5 and sample.plan.caption not in wrong
        for words in wrong:
            changed[difference(right, facts(words))] += 1
    assert set(changed) == {"scene", "colour", "kind", "place"}
    with pytest.raises(ValueError, match="ask for fewer"):
        tasks.wrong_captions(samples[0].truth, rng, 500)


def facts(caption):
    """(scene, {(kind, colour, place)}) read back from a caption."""
    scene, things = re.fullmatch(r"A (\w+) with (.*)\.", caption).groups()
    found = re.findall(r"a (?:(\w+) in (\w+)|(\w+) (\w+)) at the (\w+ \w+)", things)
    return scene, {(a or d, b or c, place) for a, b, c, d, place in found}


def difference(right, wrong):
    """The name of the only fact that differs; anything else is a failure."""
    if right[0] != wrong[0]:
        assert right[1] == wrong[1]
        return "scene"
    assert right[0] == wrong[0] and len(right[1]) == len(wrong[1])
    (old,), (new,) = right[1] - wrong[1], wrong[1] - right[1]
    (name,) = [name for name, a, b in zip(("kind", "colour", "place"), old, new) if a != b]
    return name


# --------------------------------------------------------------------------------------------------
# the judge


def test_the_truth_scores_ten(samples, held_out):
    for sample in samples[:60] + held_out[:60]:
        assert judge(sample.target, sample.truth) == Verdict(10, 10, 10)
    enlarged = samples[0].target.resize((128, 128), Image.Resampling.NEAREST)
    assert judge(enlarged, samples[0].truth) == Verdict(10, 10, 10)
    assert judge(np.asarray(samples[0].target), samples[0].truth) == Verdict(10, 10, 10)


def test_the_truth_scores_ten_in_every_scene_behind_four_things():
    rng = np.random.default_rng(0)
    for scene in world.scenes():
        cast = [world.subjects()[i] for i in rng.choice(len(world.subjects()), 4)]
        things = [world.known_thing(*placed) for placed in zip(world.PLACES, cast)]
        truth = world.Truth(scene, tuple(things), True)
        assert judge(world.draw(truth), truth).overall == 10


def test_a_wrong_identity_lowers_sc_and_not_pf(samples):
    rng = np.random.default_rng(0)
    for sample in samples[:50]:
        index = int(rng.integers(len(sample.truth.things)))
        subject = sample.truth.things[index].subject
        options = [tuple(values) for values in world.looks_of(subject.kind).values()]
        which = int(rng.integers(len(options)))
        others = [value for value in options[which] if value != subject.looks[which]]
        other = others[int(rng.integers(len(others)))]
        looks = (*subject.looks[:which], other, *subject.looks[which + 1 :])
        verdict = judge(world.draw(with_thing(sample.truth, index, looks=looks)), sample.truth)
        assert verdict.pf == 10 and verdict.sc < 9.6


def test_one_wrong_look_costs_its_share():
    subject = world.Subject("man", "red", ("black", "tan", "none"))
    scene = world.Scene("meadow", ("day", "left", "plain"))
    truth = world.Truth(scene, (world.known_thing("top left", subject),), False)
    wrong = with_thing(truth, 0, looks=("blond", "tan", "none"))
    # colour, face, accessory are right
    assert judge(world.draw(wrong), truth).sc == pytest.approx(10 * 3 / 4)
    wrong = with_thing(truth, 0, colour="blue")
    verdict = judge(world.draw(wrong), truth)
    assert verdict.pf == pytest.approx(10 * (1 + 0.5 + 1) / 3)
    assert verdict.sc == pytest.approx(10 * 3 / 4)
    assert verdict.overall == pytest.approx((verdict.pf * verdict.sc) ** 0.5)


def test_a_colour_that_only_words_name_is_left_to_pf(samples):
    edits = [s for s in samples if s.task == "attribute" and len(s.references) == 1]
    for sample in edits[:30]:
        (index,) = [i for i, thing in enumerate(sample.truth.things) if "colour" not in thing.given]
        colour = "red" if sample.truth.things[index].subject.colour != "red" else "blue"
        verdict = judge(world.draw(with_thing(sample.truth, index, colour=colour)), sample.truth)
        assert verdict.sc == 10 and verdict.pf < 9.5


def test_a_missing_or_misplaced_thing_lowers_pf(samples):
    for sample in samples[:30]:
        truth = sample.truth
        missing = judge(world.draw(replace(truth, things=truth.things[1:])), truth)
        taken = [thing.place for thing in truth.things]
        free = [place for place in world.PLACES if place not in taken]
        assert missing.pf < 8.5 and missing.sc < 8.5
        if free:
            moved = replace(truth.things[0], place=free[0])
            picture = world.draw(replace(truth, things=truth.things[1:] + (moved,)))
            verdict = judge(picture, truth)
            # it stands where nobody asked
            assert verdict.pf < missing.pf and verdict.sc <= missing.sc + 1e-9


def test_scenes(samples):
    for sample in samples[:30]:
        scene = sample.truth.scene
        palette = "dusk" if scene.looks[0] == "day" else "day"
        other = replace(scene, looks=(palette, *scene.looks[1:]))
        verdict = judge(world.draw(replace(sample.truth, scene=other)), sample.truth)
        assert verdict.pf == 10
        assert (verdict.sc == 10) == (not sample.truth.scene_given)  # words leave the variant free
        kind = replace(scene, kind="city" if scene.kind != "city" else "meadow")
        verdict = judge(world.draw(replace(sample.truth, scene=kind)), sample.truth)
        assert verdict.pf < 8.5
        assert verdict.sc < 8.5 if sample.truth.scene_given else verdict.sc == 10


def test_noise_and_one_colour_score_nothing(samples):
    rng = np.random.default_rng(0)
    for sample in samples[:8]:
        pictures = [rng.integers(0, 256, (32, 32, 3))]
        pictures += [np.clip(rng.normal(128, 60, (32, 32, 3)), 0, 255)]
        pictures += [np.full((32, 32, 3), value) for value in (0, 64, 90, 128, 170, 255)]
        # the colour of the ground
        pictures += [np.tile(world.scene_picture(sample.truth.scene)[-1, 0], (32, 32, 1))]
        for picture in pictures:
            verdict = judge(picture.astype(np.uint8), sample.truth)
            assert verdict.pf < 0.5 and verdict.sc < 0.5 and verdict.overall < 0.5


def test_blur_and_noise_lie_in_between(samples):
    rng = np.random.default_rng(0)

    def mean(change):
        verdicts = [judge(change(sample.target), sample.truth) for sample in samples[:16]]
        return np.mean([(verdict.pf, verdict.sc) for verdict in verdicts], 0)

    def noisy(image):
        return np.clip(np.asarray(image) + rng.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)

    def blur(radius):
        return lambda image: image.filter(ImageFilter.GaussianBlur(radius))

    blurred = [mean(blur(radius)) for radius in (0.5, 1, 2)]
    assert np.all(np.diff(np.stack(blurred), axis=0) < -1)  # the more blurred, the worse
    assert np.all((3 < blurred[1]) & (blurred[1] < 7)) and np.all(blurred[0] > 8)
    assert np.all((5 < mean(noisy)) & (mean(noisy) < 9))


def test_the_nearest_subject_is_the_brute_force_one(samples):
    rng = np.random.default_rng(0)
    noisy = np.asarray(samples[0].target) / 255 + rng.normal(0, 0.1, (32, 32, 3))
    picture = np.clip(noisy, 0, 1).astype(np.float32)
    scene = world.scene_picture(samples[0].truth.scene).astype(np.float64) / 255
    for place, (subject, _) in nearest_subjects(picture, scene.astype(np.float32)).items():
        y, x = world.corner_of(place)
        crop = picture[y : y + 16, x : x + 16].astype(np.float64)  # (16, 16, 3)
        behind = scene[y : y + 16, x : x + 16]  # (16, 16, 3)
        costs = [np.square(crop - behind).sum()]
        for one in world.subjects():
            rgb, silhouette = world.sprite(one)
            costs.append(np.square(crop - np.where(silhouette[..., None], rgb / 255, behind)).sum())
        assert subject == ((None,) + world.subjects())[int(np.argmin(costs))]


# --------------------------------------------------------------------------------------------------
# the tokenizer


def test_tokenizer_round_trips(tmp_path, samples):
    tokenizer = train_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.get_vocab() == load_tokenizer(tmp_path / "tokenizer").get_vocab()
    assert 260 < len(tokenizer) <= 1024
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    texts = [iccot.render(sample.plan) for sample in samples[:100]]
    texts += [sample.instruction for sample in samples[:100]]
    texts += ["Zwölf Boxkämpfer — 日本語 🙂\n\n  two  spaces , x . y 's\t"]
    texts += [" lead", "trail ", "", "\x00\x7f"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    plans = [tokenizer(text).input_ids for text in texts[:100]]
    assert np.mean([len(ids) for ids in plans]) < 40 and max(map(len, plans)) < 70
    # the tags fuse with the first word
    assert tokenizer.decode(plans[0][:1]).startswith("<think><out_caption>A")
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1


def test_tokenizer_mistakes(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 is too small"):
        train_tokenizer(tmp_path, vocab_size=100)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path / "nothing")
