"""The settings of the data: which pictures, how they are cut, what their captions become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sdlora.config.section import Count, NotNegative, Positive, Section, Share

Layout = Literal["auto", "folder", "kohya-folders", "kohya-config", "kohya-metadata", "imagefolder", "shards", "hub"]


class CaptionsSection(Section):
    """What a caption becomes at each step. The steps happen in the order of these settings."""

    insert_trigger: bool = False
    """Put the trigger and a separator before captions that do not hold it; there it is never moved nor dropped."""
    prefix: str = ""
    """Text before every caption, and a space."""
    suffix: str = ""
    """A space, and text after every caption."""
    dropout: Share = 0.0
    """Share of examples trained without a caption, which guidance needs."""
    dropout_every_epochs: Count = 0
    """Train every so many-th epoch without captions: n, 2n, and so on; 0: none."""
    lines: Literal["alternatives", "first"] = "alternatives"
    """Of a caption of several lines one is drawn each time, or the first is taken."""
    wildcards: bool = False
    """Draw one of the choices in "{a|b|c}"; "{{" and "}}" stand for plain braces."""
    separator: str = ","
    """What lies between tags."""
    keep_tags: Count = 0
    """So many tags at the start are never moved nor dropped."""
    keep_separator: str = ""
    """Instead, in captions that hold this mark, such as "|||": tags before it stay; after a second one they stay too, at the end."""
    shuffle: bool = False
    """Put the other tags in a new order each time."""
    tag_dropout: Share = 0.0
    """Share of the other tags left out each time."""
    secondary_separator: str = ""
    """A mark, such as ";;;", that joins tags which stay together; it becomes the separator at the end."""
    variants: Positive = 16
    """At most so many different texts of one caption are encoded, where the text encoder is not trained."""


class BucketsSection(Section):
    """Shapes that pictures are cut to, so that pictures of equal shape make a batch."""

    enabled: bool = True
    """Group pictures by aspect ratio; false: crop all to squares."""
    shapes: Literal["fitted", "classic"] = "fitted"
    """fitted: the shapes that crop least from this set of pictures; classic: the fixed list of kohya's trainer."""
    count: Count = 0
    """Largest number of fitted shapes; 0: as many as the classic list has."""
    step: Count = 0
    """Sides are multiples of this number of pixels; 0: 16 for fitted shapes, 64 for classic ones, less at a small resolution."""
    min_side: Count = 0
    """Shortest side in pixels; 0: half the resolution."""
    max_side: Count = 0
    """Longest side in pixels; 0: double the resolution."""
    upscale: bool = True
    """Enlarge pictures that are smaller than their shape; false: they keep their size, cut to multiples of the step."""
    short_batches: Literal["keep", "fill", "drop"] = "keep"
    """What becomes of the last batch of a shape when too few pictures are left: train it short, fill it with pictures of that shape drawn again, or leave it out."""


class MasksSection(Section):
    """Which part of a picture is learnt: white is, black is not."""

    source: Literal["auto", "none", "files", "folder", "alpha"] = "auto"
    """files: NAME-masklabel.png beside the picture; folder: the file of the same name in masks.folder; alpha: the picture's own opacity; auto: folder where it is set, else files where there are any."""
    folder: str = ""
    """Folder of masks that have their pictures' names."""
    unmasked_weight: Share = 0.1
    """Weight of the black parts in the loss; white counts 1."""
    hold_weight: NotNegative = 0.0
    """Weight of a second loss that holds the black parts to what the base alone predicts; 0: none."""


class ConceptSection(Section):
    """One subject or style: its pictures, and how they are trained."""

    folder: str = ""
    """Folder of pictures; or a dataset file of kohya's trainer; or a Hugging Face dataset id. See datasets/README.md."""
    layout: Layout = "auto"
    """How the folder is to be read; auto: as its content suggests, which is printed."""
    caption: str = ""
    """Caption of every picture that has none of its own; empty: such pictures are an error."""
    caption_from: Literal["auto", "files", "filename", "instance"] = "auto"
    """files: text beside the picture or in its table, and an error where there is none; filename: the picture's name; instance: data.caption for all; auto: files, and data.caption where there is none."""
    caption_suffixes: tuple[str, ...] = (".txt", ".caption")
    """Endings of caption files; the first that exists is taken."""
    caption_column: str = ""
    """Column of a table that holds the captions; empty: it is looked for."""
    image_column: str = ""
    """Column of a table that holds the pictures; empty: it is looked for."""
    split: str = "train"
    """Which part of a dataset that comes in parts."""
    trigger: str = ""
    """The new word that calls the concept; replaces "[trigger]" in captions and goes into the file's metadata."""
    class_prompt: str = ""
    """What the subject is without its trigger, such as "a photo of a cat"; for data.prior."""
    repeats: Annotated[int, Field(gt=0, le=100_000)] = 1
    """How often each picture comes in one epoch."""
    weight: NotNegative = 1.0
    """Weight of its pictures in the loss."""
    resolution: Count = 0
    """Side in pixels of the square whose area every training picture gets; 0: the base's own."""
    batch_size: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Pictures per batch and process, where it differs from training.batch_size; 0: the same."""
    flip: bool = False
    """Mirror each picture at random; not for subjects with a left and a right."""
    crops: Annotated[int, Field(gt=0, le=1000)] = 1
    """1: one crop around the centre; more: so many crops at random places, one of them drawn each time."""
    background: str = "white"
    """Colour behind transparent parts, by name or as "#rrggbb"."""
    held_out: Share = 0.0
    """Share of the pictures kept out of training, for validation."""
    captions: CaptionsSection = CaptionsSection()
    buckets: BucketsSection = BucketsSection()
    masks: MasksSection = MasksSection()


class PriorSection(Section):
    """Prior preservation: what keeps the adapter from changing more than its subject."""

    source: Literal["folder", "generated", "training"] = "folder"
    """folder: captioned pictures of other things; generated: pictures of each class_prompt, made once by the base; training: the training pictures themselves under their class_prompt."""
    folder: str = ""
    """Folder of captioned pictures of other things, in any layout; empty: none."""
    target: Literal["base", "picture"] = "base"
    """What is learnt on them: what the base alone predicts, or the picture itself as in DreamBooth."""
    weight: NotNegative = 1.0
    """Weight of prior preservation in the loss."""
    ratio: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """So many of these pictures come per training picture, taken in turns, in steps of a hundredth; 0: each as often as data.repeats says."""
    count: Positive = 100
    """How many pictures are generated for each class_prompt."""
    seed: Count = 0
    """Seed of the first generated picture."""
    steps: Positive = 25
    """Denoising steps of generated pictures."""
    guidance_scale: NotNegative = 5.0
    """Strength of the prompt in generated pictures."""


class CacheSection(Section):
    """Encoded pictures and captions on disk, shared by all runs."""

    folder: str = ""
    """Where they are kept; empty: the user's cache folder, or $SDLORA_CACHE."""
    limit_gb: NotNegative = 20.0
    """Of encoded pictures and captions, what was used least recently is removed beyond this size, but nothing that any run uses."""


class DataSection(ConceptSection):
    """The pictures and their captions. Each [[data.concepts]] may set any of a concept's settings for itself."""

    concepts: tuple[ConceptSection, ...] = ()
    """Several concepts, each a table [[data.concepts]] with its own folder; what one leaves out is as in [data]. In TOML only."""
    prior: PriorSection = PriorSection()
    cache: CacheSection = CacheSection()

    @model_validator(mode="before")
    @classmethod
    def _share_settings(cls, values: Any) -> Any:
        """Return the values with what [data] sets handed down to each concept that does not set it."""
        if not isinstance(values, Mapping) or not isinstance(values.get("concepts"), list | tuple):
            return values
        shared = {key: value for key, value in values.items() if key in ConceptSection.model_fields and key != "folder"}
        concepts = [_merged(shared, own) for own in values["concepts"]]
        return {**values, "concepts": concepts}


def _merged(shared: Mapping[str, Any], own: Any) -> Any:
    """Return `own` over `shared`, tables within tables too."""
    if not (isinstance(own, Mapping) and isinstance(shared, Mapping)):
        return own
    return {**shared, **{key: _merged(shared[key], value) if key in shared else value for key, value in own.items()}}
