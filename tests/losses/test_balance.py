import pytest
import torch

from retina.losses.balance import class_balanced_weights, hardest, hardest_negatives

COUNTS = [5000, 500, 50, 5]


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
def test_weights_are_the_published_formula(beta: float):
    expected = torch.tensor([(1 - beta) / (1 - beta**n) for n in COUNTS])
    expected *= len(COUNTS) / expected.sum()
    torch.testing.assert_close(class_balanced_weights(COUNTS, beta=beta), expected)


def test_the_ends_of_beta():
    assert class_balanced_weights(COUNTS, beta=0.0).tolist() == [1, 1, 1, 1]
    inverse = class_balanced_weights(COUNTS, beta=1.0)
    torch.testing.assert_close(inverse * torch.tensor(COUNTS), torch.full((4,), inverse[3].item() * 5))
    torch.testing.assert_close(class_balanced_weights(COUNTS, beta=1 - 1e-12), inverse)


def test_an_absent_class_gets_nothing_and_changes_nothing():
    with_absent = class_balanced_weights([5000, 0, 500, 50, 5])
    assert with_absent[1] == 0
    torch.testing.assert_close(with_absent[[0, 2, 3, 4]], class_balanced_weights(torch.tensor(COUNTS)))


@pytest.mark.parametrize(
    ("counts", "beta", "message"),
    [
        ([1, 2], 1.5, "beta"),
        ([1, -2], 0.9, "counts must be at least 0, got -2"),
        ([0, 0], 0.9, "not all 0"),
        (torch.ones(2, 2), 0.9, "one number"),
    ],
)
def test_weights_of_nonsense_are_refused(counts, beta: float, message: str):
    with pytest.raises(ValueError, match=message):
        class_balanced_weights(counts, beta=beta)


@pytest.mark.parametrize(("fraction", "number"), [(0.05, 2), (0.5, 12), (1.0, 24)])
def test_the_hardest_of_all(fraction: float, number: int):
    losses = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    kept = hardest(losses, fraction=fraction)
    assert kept.shape == losses.shape
    assert sorted(losses[kept].tolist()) == losses.flatten().sort().values[-number:].tolist()


def test_what_has_no_loss_is_not_hard():
    assert hardest(torch.tensor([0.0, 0, 3, 0]), fraction=1.0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0, 100.0])
def test_negatives_in_a_ratio_to_positives(ratio: float):
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1
    positive = torch.arange(40) % 13 == 0  # 4 of them
    kept = hardest_negatives(losses, positive, ratio=ratio)
    assert kept[positive].all()
    negatives = losses[~positive].sort().values
    number = min(36, int(4 * ratio))
    assert sorted(losses[kept & ~positive].tolist()) == negatives[36 - number :].tolist()


def test_without_positives_no_negative_is_kept():
    assert not hardest_negatives(torch.ones(5), torch.zeros(5, dtype=torch.bool)).any()


def test_settings_out_of_range_are_refused():
    for fraction in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="fraction must be"):
            hardest(torch.ones(3), fraction=fraction)
    with pytest.raises(ValueError, match="ratio must be"):
        hardest_negatives(torch.ones(3), torch.ones(3, dtype=torch.bool), ratio=-1.0)
