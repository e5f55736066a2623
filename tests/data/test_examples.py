from pathlib import Path

from sdlora.config import ConceptSection
from sdlora.data.examples import place_in_buckets, plan_examples
from sdlora.data.index import PictureFacts
from sdlora.data.sample import Concept, Sample
from sdlora.data.store import TensorStore


def concept(**settings):
    return Concept("c", ConceptSection.model_validate({"buckets": {"shapes": "classic"}, **settings}))


def sample(number, owner, **values):
    return Sample(Path(f"{number}.png"), ("x",), owner, **values)


def planned(tmp_path, samples, sizes, masks=None):
    facts = [PictureFacts(f"{number:064x}", *size) for number, size in enumerate(sizes)]
    masks = masks or [""] * len(samples)
    return plan_examples(samples, facts, masks, 64, TensorStore(tmp_path / "store"))


def test_each_concept_has_its_own_resolution_and_rules():
    square = concept(buckets={"enabled": False})
    large = concept(resolution=128)
    samples = [sample(0, concept()), sample(1, square), sample(2, large), sample(3, large, train_size=(72, 40))]
    facts = [PictureFacts("", 300, 150)] * 4
    buckets = place_in_buckets(samples, facts, 64)
    assert buckets[1] == (64, 64)
    assert buckets[3] == (72, 40)
    assert 1.6 < buckets[0][0] / buckets[0][1] < 2.5 and buckets[0][0] * buckets[0][1] <= 64 * 64
    assert 128 * 128 * 0.7 < buckets[2][0] * buckets[2][1] <= 128 * 128


def test_fitted_shapes_follow_all_pictures_under_the_same_rules():
    owner = Concept("c", ConceptSection(resolution=512))
    samples = [sample(number, owner) for number in range(6)]
    facts = [PictureFacts("", 3000, 2000)] * 6
    assert set(place_in_buckets(samples, facts, 64)) == {(624, 416)}  # 3:2 to the pixel; the classic list has none


def test_names_tell_apart_what_is_encoded_differently(tmp_path):
    owners = [concept(), concept(background="black"), concept(masks={"source": "alpha"}), concept(repeats=5)]
    samples = [sample(0, owner) for owner in owners] + [sample("renamed", owners[0]), sample(0, owners[0])]
    facts = [PictureFacts("0", 64, 64)] * 5 + [PictureFacts("1", 64, 64)]
    examples = plan_examples(samples, facts, [""] * 6, 64, TensorStore(tmp_path / "a"))
    names = [example.variants[0].name for example in examples]
    assert names[0] == names[3] == names[4]  # neither repeats nor the file's name matter
    assert len({names[0], names[1], names[2], names[5]}) == 4
    masked = plan_examples(samples[:1], facts[:1], ["m"], 64, TensorStore(tmp_path / "b"))
    assert masked[0].variants[0].name != names[0]


def test_a_mirrored_variant_tells_the_model_the_mirrored_crop(tmp_path):
    owner = concept(flip=True, crops=4, buckets={"enabled": False})
    (example,) = planned(tmp_path, [sample(0, owner)], [(200, 100)])
    assert [variant.flipped for variant in example.variants] == [False, True] * 4
    for plain, mirrored in zip(example.variants[::2], example.variants[1::2], strict=True):
        assert plain.cut == mirrored.cut
        assert plain.size.crop_top_left[1] + mirrored.size.crop_top_left[1] == 128 - 64  # scaled to 128 x 64
    assert len({variant.name for variant in example.variants}) == 8


def test_chance_follows_the_content(tmp_path):
    owner = concept(crops=3, buckets={"enabled": False})
    one, other = planned(tmp_path, [sample(0, owner), sample(1, owner)], [(200, 64), (200, 64)])
    assert [v.cut for v in one.variants] != [v.cut for v in other.variants]
    (again,) = planned(tmp_path, [sample("elsewhere", owner)], [(200, 64)])
    assert [v.cut for v in again.variants] == [v.cut for v in one.variants]
