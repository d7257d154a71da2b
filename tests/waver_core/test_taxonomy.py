"""The taxonomy of actions: its size, the form of its labels, and what is said of a file that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from waver_core.backends.contracts import ActionLabel
from waver_core.errors import ConfigError
from waver_core.taxonomy import load_taxonomy

GOOD = "Sports:\n  Running:\n    - jogging\n    - running on a track\nMusic:\n  Singing:\n    - singing a song\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "actions.yaml"
    path.write_text(text)
    return path


def test_counts_are_those_of_the_report() -> None:
    first, second, third = load_taxonomy().counts
    assert (first, second) == (12, 100)
    assert third > 6000


def test_no_class_is_nearly_empty() -> None:
    sizes = {level2: len(labels) for classes in load_taxonomy().tree.values() for level2, labels in classes.items()}
    assert {name: size for name, size in sizes.items() if size < 30} == {}


def test_labels_have_the_form_that_the_header_promises() -> None:
    labels = [path.level3 for path in load_taxonomy()]
    assert [label for label in labels if not re.fullmatch(r"[a-z0-9][a-z0-9' -]*", label)] == []
    assert [label for label in labels if not 1 <= len(label.split()) <= 7] == []
    assert [label for label in labels if not re.search(r"ing\b", label)] == []


def test_no_label_stands_twice_articles_aside() -> None:
    plain = [re.sub(r"\b(a|an|the) ", "", path.level3.lower()) for path in load_taxonomy()]
    assert len(plain) == len(set(plain))


def test_every_label_knows_its_path() -> None:
    taxonomy = load_taxonomy()
    for level1, classes in taxonomy.tree.items():
        for level2, labels in classes.items():
            assert all(taxonomy.path_of(label) == ActionLabel(level1, level2, label) for label in labels)


def test_loading_is_cached() -> None:
    assert load_taxonomy() is load_taxonomy()


def test_unknown_label_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'jogging'"):
        load_taxonomy(write(tmp_path, GOOD)).path_of("joging")


def test_digest_follows_the_labels_and_their_order(tmp_path: Path) -> None:
    texts = [GOOD, GOOD.replace("jogging", "sprinting"), GOOD.replace("Running", "Runs")]
    texts.append("Music:\n  Singing:\n    - singing a song\nSports:\n  Running:\n    - jogging\n    - running on a track\n")
    digests = []
    for number, text in enumerate(texts):
        folder = tmp_path / str(number)
        folder.mkdir()
        digests.append(load_taxonomy(write(folder, text)).digest)
    assert len(set(digests)) == len(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "    - Running on the track\n", "'Running on the track' stands twice, in 'Running' and in 'Singing'"),
        (GOOD + "  Running:\n    - dashing\n", "class 'Running' stands under 'Sports' and 'Music'"),
        (GOOD + "Sports:\n  Jumps:\n    - leaping\n", "'Sports' stands twice"),
        (GOOD + "  Humming:\n", "'Music / Humming' must be a list"),
        (GOOD + "  Humming: []\n", "'Music / Humming' must be a list"),
        (GOOD + "Dance: {}\n", "'Dance' must hold second-level classes"),
        (GOOD + "Dance:\n  - waltzing\n", "'Dance' must hold second-level classes"),
        (GOOD + "  Humming:\n    - loud: [humming]\n", "only text nests so deep"),
        (GOOD + "  Humming:\n    - 3\n", "3, which is not a label"),
        (GOOD + "  1:\n    - humming\n", "'1' in 'Music' is not a name"),
        ("- jogging\n", "first-level names must stand at the top"),
        ("", "first-level names must stand at the top"),
        ("Sports: [\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_taxonomy(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the taxonomy .*nowhere\.yaml"):
        load_taxonomy(tmp_path / "nowhere.yaml")
