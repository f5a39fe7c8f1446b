"""assign_splits: whole subjects, fractions by class, balanced sex and age, and no subject changes split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from adni_ldm.data.splits import assign_splits, subject_fraction

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}


def draw_people(count: int, seed: int = 0) -> pd.DataFrame:
    """Subjects of three classes with different ages and sexes; some ages are unknown."""
    rng = np.random.default_rng(seed)
    label = rng.choice(["AD", "MCI", "NC"], count, p=[0.2, 0.3, 0.5])
    age = np.where(label == "AD", 76, 72) + rng.normal(0, 7, count)
    age[rng.random(count) < 0.05] = np.nan
    sex = np.where(rng.random(count) < np.where(label == "AD", 0.7, 0.4), "M", "F")
    subject = [f"{seed}_S_{number:04d}" for number in range(count)]
    return pd.DataFrame({"subject": subject, "label": label, "age": age, "sex": sex})


def test_every_class_has_its_share_and_the_splits_are_alike_in_sex_and_age():
    """Much more alike than chance makes them: as a hash of the name would."""
    off = {"balanced": [], "by chance": []}
    for seed in range(4):
        people = draw_people(600, seed)
        balanced = assign_splits(people, FRACTIONS)
        for how, splits in (("balanced", balanced), ("by chance", {s: by_chance(s) for s in people.subject})):
            for _, members in people.assign(split=people.subject.map(splits)).groupby("label"):
                for split, part in members.groupby("split"):
                    if how == "balanced":
                        assert abs(len(part) - FRACTIONS[split] * len(members)) < 1
                    women = (part.sex == "F").mean() - (members.sex == "F").mean()
                    off[how].append((abs(part.age.mean() - members.age.mean()), abs(women)))
    years, women = np.mean(off["balanced"], axis=0)
    years_by_chance, women_by_chance = np.mean(off["by chance"], axis=0)
    assert years < 0.5 * years_by_chance and women < 0.3 * women_by_chance


def by_chance(subject: str) -> str:
    number = subject_fraction(subject)
    return "test" if number < 0.15 else "val" if number < 0.3 else "train"


def test_nobody_moves_when_others_arrive():
    few, more = draw_people(60), draw_people(90, seed=1)
    before = assign_splits(few, FRACTIONS)
    both = pd.concat([more, few])
    after = assign_splits(both, FRACTIONS, fixed=before)
    assert {subject: after[subject] for subject in before} == before
    assert after == assign_splits(both.sample(frac=1, random_state=0), FRACTIONS, fixed=before)
    share = pd.Series(after).value_counts(normalize=True)
    assert share["train"] == pytest.approx(0.7, abs=0.02), "the newcomers make up for what was uneven"


def test_small_classes_have_one_subject_a_split_and_train_comes_first():
    people = pd.DataFrame({"subject": list("abcdef"), "label": ["AD"] * 3 + ["NC"] * 2 + ["MCI"]})
    splits = assign_splits(people.assign(age=np.nan, sex=None), FRACTIONS)
    by_class = people.subject.map(splits).groupby(people.label).agg(sorted).to_dict()
    assert by_class == {"AD": ["test", "train", "val"], "NC": ["test", "train"], "MCI": ["train"]}


def test_a_test_set_that_someone_else_chose_is_kept():
    """The listed subjects are exactly the test set; the others are assigned to train and val."""
    people = draw_people(100)
    chosen = dict.fromkeys(people.subject[:30], "test")
    splits = assign_splits(people, {"train": 0.8, "val": 0.2}, chosen)
    assert {subject for subject, split in splits.items() if split == "test"} == set(chosen)
    counts = pd.Series(splits).value_counts()
    assert counts["val"] == pytest.approx(14, abs=2) and counts.sum() == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": {"train": 1, "dev": 1}}, "no split dev"),
        ({"fractions": {"train": 1, "val": 0}}, "above 0"),
        ({"fixed": {"0_S_0001": "holdout"}}, "no split holdout"),
        ({"subjects": pd.concat([draw_people(5)] * 2)}, "two rows: 0_S_0000"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        assign_splits(**{"subjects": draw_people(5), "fractions": FRACTIONS} | change)
