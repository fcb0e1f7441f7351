"""`python -m dreambooth.lab.class_renders FOLDER`: true pictures of the lab's classes with captions, as real class images for a prior.

FOLDER gets `<count>/<class noun>/00000.png` with `00000.txt` beside it, for `prior.class_dir='FOLDER/64/{subject}'`. Each picture shows another
individual of the class, none of them a subject of an experiment or of the judge by ground truth. Places and captions are those of the class
images that the lab's recipe draws, in turn; where the caption names no place, it is one of the others' places.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dreambooth.errors import UserError
from dreambooth.files import write_png, write_text
from dreambooth.lab.identities import caption, check_word, identity
from dreambooth.lab.splits import CLASS_IMAGE_CONTEXTS, TRAINED_CLASSES, TRAINED_SEEDS
from dreambooth.lab.world import render_keyed

FIRST_INDIVIDUAL = TRAINED_SEEDS.start + 100_000  # behind the rivals of `ground_truth`
CLASS_STREAM = 13  # part of the key of every picture: its pose is of no photo and of no other picture


def write_renders(folder: Path, class_noun: str, count: int) -> list[Path]:
    """Writes so many captioned pictures of a class; returns their files. Picture k is the same whatever the count.

    Args:
        folder: made when missing.
        class_noun: a class of the lab's world.
        count: 1 or more.

    Raises:
        UserError: an unknown class, or a count below 1.
    """
    check_word("--classes", "class", class_noun, TRAINED_CLASSES)
    if count < 1:
        raise UserError("--count", "must be 1 or more", count, "64 are what the lab's recipe draws")
    captioned = (None, *CLASS_IMAGE_CONTEXTS)  # None: unsaid
    named = [captioned[k % len(captioned)] for k in range(count)]
    places = [place or CLASS_IMAGE_CONTEXTS[k // len(captioned) % len(CLASS_IMAGE_CONTEXTS)] for k, place in enumerate(named)]
    subjects = [identity(class_noun, FIRST_INDIVIDUAL + k) for k in range(count)]
    pictures = render_keyed(subjects, places, [(subject.seed, k, CLASS_STREAM) for k, subject in enumerate(subjects)])  # (N, 3, 64, 64)
    files = []
    for k, (picture, subject, place) in enumerate(zip(pictures, subjects, named, strict=True)):
        files.append(write_png(folder / f"{k:05d}.png", Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())))
        write_text(files[-1].with_suffix(".txt"), caption(subject, place) + "\n")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m dreambooth.lab.class_renders", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="gets a folder for each count, and in it one for each class")
    parser.add_argument("--count", type=int, nargs="+", default=[64], help="pictures of each class; several: a folder for each; default: 64")
    parser.add_argument("--classes", nargs="+", default=list(TRAINED_CLASSES), help="default: all that the lab's base knows")
    given = parser.parse_args(arguments)
    try:
        for count in given.count:
            for noun in given.classes:
                write_renders(given.folder / str(count) / noun, noun, count)
            place = given.folder / str(count)
            print(f"{count} pictures of each of {len(given.classes)} classes: prior.class_dir='{place}/{{subject}}'")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
