"""DreamBench's folder and prompt file: parsed strictly, never run; what a run takes from them."""

from collections import Counter
from pathlib import Path

import pytest
from small_runs import composed, make_dreambench, make_photos, run, typed

from dreambooth.dreambench import AbsentSubjectError, prompt_kind, read_dreambench, same_prompt
from dreambooth.errors import ConfigError, UserError
from dreambooth.photo_folder import read_photo_folder
from dreambooth.recipes import resolve

REAL = Path(__file__).resolve().parents[2] / "shared" / "dreambench"
NEEDS_REAL = pytest.mark.skipif(not REAL.is_dir(), reason="DreamBench's own folder is not beside the repository")
SUBJECTS = {"puppy": "dog", "mug": "mug", "plush_bear": "stuffed animal"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dreambench(tmp_path_factory.mktemp("bench"), SUBJECTS)


def changed(bench: Path, tmp_path: Path, old: str, new: str) -> Path:
    """Returns a folder of the same subjects whose prompt file differs in one place."""
    for name in SUBJECTS:
        (tmp_path / name).mkdir()
    text = (bench / "prompts_and_classes.txt").read_text()
    assert text.count(old) >= 1
    (tmp_path / "prompts_and_classes.txt").write_text(text.replace(old, new, 1))
    return tmp_path


def test_subjects_have_their_class_and_sort_in_the_files_order(bench: Path) -> None:
    found = read_dreambench(bench)
    assert [(s.name, s.class_noun, s.sort) for s in found.subjects] == [
        ("puppy", "dog", "live"),
        ("mug", "mug", "object"),
        ("plush_bear", "stuffed animal", "object"),
    ]


def test_live_subject_gets_live_prompts_and_object_gets_object_prompts(bench: Path) -> None:
    found = read_dreambench(bench)
    assert found.prompts(found.subject("puppy")) == ("a {subject} in the snow", "a {subject} wearing a red hat", "a red {subject}")
    assert found.prompts(found.subject("mug"))[1] == "a {subject} with a city in the background"


@NEEDS_REAL
def test_published_file_has_30_subjects_9_of_them_live_and_25_prompts_of_each_sort() -> None:
    found = read_dreambench(REAL)
    assert len(found.subjects) + len(found.absent) == 30
    assert len(found.object_prompts) == len(found.live_prompts) == 25
    assert len(set(found.object_prompts) | set(found.live_prompts)) == 35
    assert [s.name for s in found.subjects if s.live] == ["cat2", "dog6"]
    assert Counter(map(prompt_kind, found.object_prompts)) == {"recontextualisation": 20, "property": 5}
    assert Counter(map(prompt_kind, found.live_prompts)) == {"recontextualisation": 10, "accessory": 10, "property": 5}
    assert found.live_prompts[13] == "a {subject} wearing a black top hat and a monocle"


def test_listed_subject_without_a_folder_is_absent_and_said(bench: Path) -> None:
    found = read_dreambench(bench)
    assert found.absent == ("absent_toy",)
    with pytest.raises(AbsentSubjectError, match="^subject.name must have a folder of photos"):
        found.subject("absent_toy")
    assert "1 listed subjects have no photos here" in found.describe("mug")


def test_folder_that_is_not_listed_is_refused_by_name(bench: Path, tmp_path: Path) -> None:
    folder = changed(bench, tmp_path, "mug,mug\n", "")
    with pytest.raises(UserError, match="/mug must be a subject that prompts_and_classes.txt lists"):
        read_dreambench(folder)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("Classes", "classes", 1),
        ("subject_name,class", "subject,class", 3),
        ("puppy,dog", "puppy", 4),
        ("puppy,dog", "../puppy,dog", 4),
        ("mug,mug", "puppy,cat", 5),
        ("'a {0} {1} in the snow'", "'a {0} in the snow'", 14),
        ("'a {0} {1} in the snow'.format", "__import__('os').system", 14),
        ("'a {0} {1} in the snow'.format(unique_token, class_token)", "'a {0} {1} in the snow'.format(class_token, unique_token)", 14),
        ("in the snow'.format(unique_token, class_token),", "in the snow'.format(unique_token, class_token)", 15),
        ("a {0} {1} with a city in the background", "a {0} {1} in the snow", 15),
        ("Live Subject Prompts", "Live Prompts", 19),
    ],
)
def test_line_that_does_not_fit_is_refused_with_file_and_line(bench: Path, tmp_path: Path, old: str, new: str, line: int) -> None:
    with pytest.raises(UserError, match=rf"prompts_and_classes.txt, line {line}, must"):
        read_dreambench(changed(bench, tmp_path, old, new))


def test_what_follows_the_last_list_is_refused(bench: Path, tmp_path: Path) -> None:
    folder = changed(bench, tmp_path, "Classes", "Classes")
    with (folder / "prompts_and_classes.txt").open("a") as file:
        file.write("\nprint('more')\n")
    with pytest.raises(UserError, match='must be the end of the file, got "print'):
        read_dreambench(folder)


def test_file_that_breaks_off_is_refused(bench: Path, tmp_path: Path) -> None:
    folder = changed(bench, tmp_path, "Classes", "Classes")
    path = folder / "prompts_and_classes.txt"
    path.write_text(path.read_text().rpartition("]")[0])
    with pytest.raises(UserError, match="must come after a line '\\]', got 'the end of the file'"):
        read_dreambench(folder)


def test_windows_line_ends_and_byte_order_mark_change_nothing(bench: Path, tmp_path: Path) -> None:
    folder = changed(bench, tmp_path, "Classes", "Classes")
    path = folder / "prompts_and_classes.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace("\n", "\r\n").encode())
    assert read_dreambench(folder).live_prompts == read_dreambench(bench).live_prompts


def test_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^data.dreambench must be a folder with prompts_and_classes.txt"):
        read_dreambench(tmp_path)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("a {subject} on top of a white rug", "recontextualisation"),
        ("a photo of a {subject} at night", "recontextualisation"),
        ("a cube shaped {subject}", "property"),
        ("a photo of a red {subject}", "property"),
        ("a {subject} in a purple wizard outfit", "accessory"),
        ("a {subject} wearing pink glasses", "accessory"),
        ("a photo of a {subject}", "plain"),
        ("a painting of a {subject} in the style of Monet", "other"),
        ("a red {subject} in the snow", "other"),
    ],
)
def test_prompt_kind_is_read_from_the_words(template: str, kind: str) -> None:
    assert prompt_kind(template) == kind


def test_same_prompt_sees_through_case_spaces_and_a_photo_of() -> None:
    assert same_prompt("A photo of a {subject}  in the snow.") == same_prompt("a {subject} in the snow")
    assert same_prompt("a {subject} in the snow") != same_prompt("a {subject} on the beach")


def test_subject_is_found_by_the_content_of_its_photos(bench: Path) -> None:
    digest = read_photo_folder(str(bench / "mug"), 64).digest
    assert read_dreambench(bench).with_photos(digest, 64).name == "mug"
    assert read_dreambench(bench).with_photos("0" * 64, 64) is None


# --- what a run takes from it -----------------------------------------------------------------------------------------------------------


def test_run_takes_photos_class_and_final_prompts_of_its_subject(bench: Path) -> None:
    config = resolve(composed(f"data.dreambench={bench}", "subject.name=puppy"))
    assert (config.data.subject_dir, config.subject.class_noun) == (str(bench / "puppy"), "dog")
    assert config.evaluation.final_prompts == list(read_dreambench(bench).live_prompts)


def test_class_noun_and_prompts_that_are_set_are_kept(bench: Path) -> None:
    words = ("subject.class_noun=animal", 'evaluation.final_prompts=["a {subject} on a bus"]')
    config = resolve(composed(f"data.dreambench={bench}", "subject.name=puppy", *words))
    assert (config.subject.class_noun, config.evaluation.final_prompts) == ("animal", ["a {subject} on a bus"])


def test_resolve_twice_is_resolve_once_with_dreambench(bench: Path) -> None:
    config = resolve(composed(f"data.dreambench={bench}", "subject.name=mug"))
    before = repr(config)
    assert repr(resolve(config)) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "subject.name must be a subject of"),
        (("subject.name=nobody",), "subject.name must be a subject of .*, got 'nobody'; choose one of puppy, mug, plush_bear"),
        (("subject.name=../mug",), "subject.name must be letters"),
        (("subject.name=mug", "data.subject_dir=elsewhere"), "data.subject_dir must be null with data.dreambench"),
    ],
)
def test_run_without_a_usable_subject_is_refused(bench: Path, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(composed(f"data.dreambench={bench}", *words))


@pytest.mark.parametrize("final", ["a photo of a {subject} at night", "a {subject} AT NIGHT."])
def test_final_prompt_that_chooses_the_step_is_refused(final: str) -> None:
    with pytest.raises(ConfigError, match="^evaluation.final_prompts must not hold a prompt of evaluation.selection_prompts"):
        resolve(composed(f'evaluation.final_prompts=["{final}"]'))


@NEEDS_REAL
def test_published_prompts_choose_no_step_on_either_recipe(tiny_folder) -> None:
    for base in ("lab", tiny_folder()):
        resolve(composed(f"base.path={base}", f"data.dreambench={REAL}", "subject.name=dog6"))


def test_run_folder_does_not_depend_on_where_the_bench_lies(bench: Path, tiny_folder, tmp_path: Path) -> None:
    other = make_dreambench(tmp_path / "elsewhere", SUBJECTS)
    words = [f"base.path={tiny_folder()}", "subject.name=mug", "prior=none", "trainer.max_steps=1", f"output_dir={tmp_path / 'runs'}"]
    first = run(*words, f"data.dreambench={bench}")
    assert run(*words, f"data.dreambench={other}").path == first.path


@pytest.mark.slow
def test_sweep_over_subjects_passes_over_the_absent_one(bench: Path, tiny_folder, tmp_path: Path) -> None:
    words = ["-m", f"base.path={tiny_folder()}", f"data.dreambench={bench}", "prior=none", "trainer.max_steps=1", "sampling.steps=1"]
    small = ["evaluation.selection_images=1", "evaluation.final_images=1", "evaluation.class_images=1", "wandb.mode=disabled"]
    result = typed(*words, *small, "subject.name=absent_toy,puppy", f"output_dir={tmp_path / 'runs'}")
    assert result.returncode == 0, result.stderr
    assert "left out: subject.name must have a folder of photos" in result.stdout
    assert len(list((tmp_path / "runs" / "default").glob("*/scores.json"))) == 1


def test_photos_of_a_bench_differ_between_subjects(bench: Path, tmp_path: Path) -> None:
    """The fixture itself: with equal photos the search by content would find anyone."""
    assert read_photo_folder(str(bench / "mug"), 64).digest != read_photo_folder(str(bench / "puppy"), 64).digest
    assert read_photo_folder(str(make_photos(tmp_path)), 64).digest != read_photo_folder(str(bench / "mug"), 64).digest
