"""The class tokens: shapes, the null class, and names to labels."""

import pytest
import torch

from adni_ldm.models import ClassEmbedding


def test_a_label_becomes_two_tokens():
    tokens = ClassEmbedding(("AD", "NC"), token_dim=32)(torch.tensor([0, 1, 1])).tokens
    assert tokens.shape == (3, 2, 32)
    assert torch.equal(tokens[1], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0, 0], tokens[0, 1]), "the two tokens of a class are learned apart"


def test_the_output_is_a_class_or_a_tuple():
    """diffusers' convention of `return_dict`."""
    embedding = ClassEmbedding(token_dim=8)
    output = embedding(torch.tensor([1]))
    assert torch.equal(output.tokens, embedding(torch.tensor([1]), return_dict=False)[0])
    assert torch.equal(output[0], output["tokens"])


def test_the_null_class_has_tokens_of_its_own():
    embedding = ClassEmbedding(("AD", "NC"), token_dim=8)
    null = embedding(torch.tensor([embedding.null_label])).tokens
    assert embedding.null_label == 2
    assert all(not torch.equal(null, embedding(torch.tensor([label])).tokens) for label in (0, 1))
    with pytest.raises(IndexError):
        embedding(torch.tensor([3]))


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("AD", [0]),
        ("NC", [1]),
        (0, [0]),
        ("1", [1]),
        (["NC", 0, " AD"], [1, 0, 0]),
        (torch.tensor([1, 0]), [1, 0]),
    ],
)
def test_classes_are_given_by_name_or_number(classes, labels):
    assert ClassEmbedding().labels_of(classes) == labels


@pytest.mark.parametrize("classes", ["MCI", 2, "2", -1, ["AD", "ad"]])
def test_an_unknown_class_is_refused_with_the_known_ones(classes):
    with pytest.raises(ValueError, match=r"classes are AD \(0\), NC \(1\)"):
        ClassEmbedding().labels_of(classes)


def test_names_and_tokens_survive_saving(tmp_path):
    embedding = ClassEmbedding(("AD", "MCI", "NC"), token_dim=8)
    embedding.save_pretrained(tmp_path)
    loaded = ClassEmbedding.from_pretrained(tmp_path)
    labels = torch.arange(4)
    assert list(loaded.config.class_names) == ["AD", "MCI", "NC"]
    assert torch.equal(loaded(labels).tokens, embedding(labels).tokens)


@pytest.mark.parametrize("name", ["../AD", "a/b", "a\\b", ".hidden", "", "=AD", "-AD"])
def test_a_class_must_be_able_to_name_a_folder(name):
    """Names come with a model of unknown origin, and become the names of folders of samples."""
    with pytest.raises(ValueError, match="each must be able to name a folder"):
        ClassEmbedding((name, "NC"))
