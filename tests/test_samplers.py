import dataclasses
import math
import re
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_learning import IoUBalancedSampler
from balanced_learning.samplers import iou_bins, random_position

# An image in the middle of training: so many negatives, with IoUs spread evenly over the interval.
INTERVALS = [(900, 0, 0), (191, 0, 0.05), (409, 0.05, 1 / 6), (300, 1 / 6, 1 / 3), (100, 1 / 3, 0.5)]
SIZES = torch.tensor([size for size, _, _ in INTERVALS], dtype=torch.float64)
NUM_POSITIVES, NUM_NEGATIVES = 65, 447  # of 512


@pytest.fixture(autouse=True)
def _everywhere(device, implementation):
    """Everything holds on every device, for the compiled op and without it."""
    with torch.device(device):
        yield


def crowded_image() -> tuple[Tensor, Tensor, Tensor]:
    """Labels, IoUs and matches of the negatives above, 60 positives and 5 ground truths."""
    spread = [low + (high - low) * (torch.arange(size) + 0.5) / size for size, low, high in INTERVALS]
    ious = torch.cat([*spread, torch.linspace(0.5, 0.9, 60), torch.ones(5)])
    labels = (torch.arange(len(ious)) >= SIZES.sum()).long()
    return labels, ious, torch.arange(len(ious)) % 5


def draw(sampler: IoUBalancedSampler, *image: Tensor, times: int | None = None) -> tuple[Tensor, Tensor]:
    """The masks of one image; with ``times``, one row a time."""
    positives, negatives = sampler(*([tensor] * (times or 1) for tensor in image))
    return (torch.stack(positives), torch.stack(negatives)) if times else (positives[0], negatives[0])


def counts_per_interval(negatives: Tensor) -> Tensor:
    """[times, M] -> [times, 5]"""
    parts = negatives[:, : int(SIZES.sum())].split(SIZES.long().tolist(), dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1).double()


def assert_mean_is(counts: Tensor, expected: Tensor) -> None:
    counts, expected = counts.cpu(), expected.cpu()
    error = counts.std(dim=0) / math.sqrt(len(counts))
    assert ((counts.mean(dim=0) - expected).abs() <= 4 * error + 1e-9).all(), f"{counts.mean(dim=0)}, not {expected}"


def assert_equally_likely(drawn: Tensor) -> None:
    """Chi-square over the columns of draws without replacement, [times, M]; it has M - 1 degrees of freedom."""
    times, m = drawn.shape
    p = drawn.double().mean()
    chi_square = ((drawn.double().sum(dim=0) - times * p) ** 2).sum() / (times * p * (1 - p)) * (m - 1) / m
    assert abs(chi_square - (m - 1)) < 4 * math.sqrt(2 * (m - 1))


def paper_row(num_bins: int) -> Tensor:
    """Expected counts of the negatives: eq. 2 over [0, 0.5] bin by bin, then a uniform fill of what is short."""
    _, ious, _ = crowded_image()
    ious = ious[: int(SIZES.sum())].double()
    probability = torch.zeros_like(ious)
    for k in range(num_bins):
        low, high = 0.5 * k / num_bins, 0.5 * (k + 1) / num_bins
        inside = (ious >= low) & (ious < high)
        probability[inside] = (NUM_NEGATIVES // num_bins / inside.sum()).clamp(max=1).double()
    left = NUM_NEGATIVES - probability.sum()
    probability += (1 - probability) * left / (1 - probability).sum()
    return counts_per_interval(probability[None])[0]


@pytest.mark.parametrize(
    ("num_bins", "measured"), [(2, [124, 25, 55, 154, 90]), (3, [117, 24, 52, 153, 100]), (5, [80, 17, 91, 164, 96])]
)
def test_negatives_follow_the_paper(num_bins, measured):
    expected = paper_row(num_bins)
    assert expected.tolist() == pytest.approx(measured, abs=2.5)  # for other IoUs within the intervals
    positives, negatives = draw(IoUBalancedSampler(num_bins=num_bins), *crowded_image(), times=400)
    assert (positives.sum(dim=1) == NUM_POSITIVES).all()
    assert (negatives.sum(dim=1) == NUM_NEGATIVES).all()
    assert_mean_is(counts_per_interval(negatives), expected)


def test_two_bins_are_random_sampling_only_when_they_reach_up_to_the_ground_truths():
    at_random = NUM_NEGATIVES * SIZES / SIZES.sum()
    _, to_ground_truth = draw(IoUBalancedSampler(num_bins=2, max_iou=None), *crowded_image(), times=400)
    _, to_threshold = draw(IoUBalancedSampler(num_bins=2), *crowded_image(), times=20)
    assert_mean_is(counts_per_interval(to_ground_truth), at_random)
    assert (counts_per_interval(to_threshold)[:, -1] > 3 * at_random[-1]).all()


@pytest.mark.parametrize("num_bins", [2, 3, 5])
@pytest.mark.parametrize("arguments", [{}, {"max_iou": None}, {"floor_iou": 0.05, "floor_fraction": 0.1}])
def test_a_call_changes_nothing_for_the_next(num_bins, arguments):
    used, new = (IoUBalancedSampler(num_bins=num_bins, **arguments) for _ in range(2))
    draw(used, *crowded_image(), times=3)
    assert used == new
    torch.manual_seed(1)
    after_use = draw(used, *crowded_image())
    torch.manual_seed(1)
    assert all(map(torch.equal, after_use, draw(new, *crowded_image())))


def test_images_of_one_call_are_drawn_alike():
    _, negatives = draw(IoUBalancedSampler(), *crowded_image(), times=400)
    for half in counts_per_interval(negatives).split(200):
        assert_mean_is(half, paper_row(3))


def test_settings_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        IoUBalancedSampler().floor_iou = 0.1


def test_torch_seed_fixes_the_draw():
    image = crowded_image()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(draw(IoUBalancedSampler(positive_fraction=0.05), *image))
    assert all(map(torch.equal, draws[0], draws[1]))
    assert not any(map(torch.equal, draws[0], draws[2]))


# Alike candidates: label, IoU in 64ths, index of the ground truth, and how many there are.
ALIKE = st.tuples(st.integers(-1, 3), st.integers(0, 64), st.integers(0, 300), st.sampled_from([1, 2, 40, 300]))


def wanted_of_parts(sampler: IoUBalancedSampler, num: int) -> list[int]:
    """Of num negatives, how many come first from below the floor, and from each bin."""
    below = round(num * sampler.floor_fraction) if sampler.floor_iou > 0 else 0
    return [below] + [(num - below) // sampler.num_bins] * sampler.num_bins


def part_of_each(sampler: IoUBalancedSampler, ious: list[Fraction]) -> Tensor:
    """0 below the floor, then the number of the bin."""
    floor = Fraction(sampler.floor_iou)
    ceiling = max(ious, default=floor) if sampler.max_iou is None else Fraction(sampler.max_iou)
    edges = [floor + (ceiling - floor) * k / sampler.num_bins for k in range(sampler.num_bins)]
    return torch.tensor([sum(iou >= edge for edge in edges) for iou in ious], dtype=torch.int64)


def assert_shared_equally(drawn: Tensor, available: Tensor) -> None:
    cut_short = drawn[drawn < available]
    assert cut_short.numel() == 0 or drawn.max() <= cut_short.min() + 1


@given(
    images=st.lists(st.lists(ALIKE, max_size=12), min_size=1, max_size=3),
    sampler=st.builds(
        IoUBalancedSampler,
        st.sampled_from([0, 1, 7, 40, 512]),
        st.sampled_from([0, 0.25, 0.5, 1]),
        num_bins=st.integers(1, 5),
        max_iou=st.sampled_from([0.25, 0.5, 1.0, None]),
        floor_iou=st.sampled_from([0, 0.125]),
        floor_fraction=st.sampled_from([0, 0.25, 1]),
        instance_balanced=st.booleans(),
        max_negatives_per_positive=st.sampled_from([None, 0.5, 3]),
    ),
    seed=st.integers(0, 2**31),
)
def test_any_batch_gives_exactly_what_it_can(images, sampler, seed):
    torch.manual_seed(seed)
    candidates = [[alike[:3] for alike in image for _ in range(alike[3])] for image in images]
    columns = [torch.tensor(image, dtype=torch.int64).reshape(-1, 3).unbind(1) for image in candidates]
    batch = [(labels, ious / 64, matched_idxs) for labels, ious, matched_idxs in columns]
    before = [[tensor.clone() for tensor in image] for image in batch]
    all_positives, all_negatives = sampler(*map(list, zip(*batch, strict=True)))
    for image, unchanged, positives, negatives in zip(batch, before, all_positives, all_negatives, strict=True):
        labels, ious, matched_idxs = image
        assert all(map(torch.equal, image, unchanged))
        assert positives.dtype == negatives.dtype == torch.bool
        assert (labels[positives] > 0).all()
        assert (labels[negatives] == 0).all()

        num_positives = min(int(sampler.batch_size_per_image * sampler.positive_fraction), int((labels > 0).sum()))
        num_negatives = sampler.batch_size_per_image - num_positives
        if sampler.max_negatives_per_positive is not None:
            num_negatives = min(num_negatives, int(sampler.max_negatives_per_positive * max(1, num_positives)))
        assert positives.sum() == num_positives
        assert negatives.sum() == min(num_negatives, int((labels == 0).sum()))

        parts = part_of_each(sampler, [Fraction(iou) for iou in ious.tolist()])
        wanted = torch.tensor(wanted_of_parts(sampler, num_negatives))
        drawn, available = (parts[mask].bincount(minlength=len(wanted)) for mask in (negatives, labels == 0))
        assert (drawn >= torch.minimum(wanted, available)).all()
        if sampler.instance_balanced:
            assert_shared_equally(*(matched_idxs[mask].bincount(minlength=301) for mask in (positives, labels > 0)))


def test_counts_are_exact_in_every_one_of_many_draws():
    image = all_negative(*[0.1] * 300, *[0.3] * 200, *[0.4] * 100)
    _, negatives = draw(IoUBalancedSampler(60), *image, times=3000)
    for part in negatives.split([300, 200, 100], dim=1):
        assert (part.sum(dim=1) == 20).all()


def test_negatives_of_one_bin_are_equally_likely():
    _, negatives = draw(IoUBalancedSampler(), *crowded_image(), times=400)
    assert_equally_likely(negatives[:, :1500])  # IoU 0 to 1/6
    assert_equally_likely(negatives[:, 1500:1800])


def test_samples_are_equally_likely_where_the_negatives_left_decide_on_the_bins():
    """Four from bins of 3, 2 and 1: one of each bin, and one of the two and the one that are left, is nine samples."""
    times = 3000
    _, negatives = draw(IoUBalancedSampler(4), *all_negative(0.1, 0.1, 0.1, 0.2, 0.2, 0.4), times=times)
    samples, counts = negatives.unique(dim=0, return_counts=True)
    assert len(samples) == 9
    chi_square = ((counts.double() - times / 9) ** 2).sum() / (times / 9)
    assert chi_square < 26.1  # one in a thousand, with 8 degrees of freedom


def test_uniform_positives_are_equally_likely():
    image = torch.ones(60, dtype=torch.int64), torch.ones(60), torch.arange(60) // 50
    positives, _ = draw(IoUBalancedSampler(40, 0.5, instance_balanced=False), *image, times=2000)
    assert_equally_likely(positives)


def test_ground_truths_and_their_boxes_are_equally_likely():
    image = torch.ones(30, dtype=torch.int64), torch.ones(30), torch.arange(10).repeat_interleave(3)
    drawn, _ = draw(IoUBalancedSampler(4, 1.0), *image, times=2000)
    assert drawn.unflatten(1, (10, 3)).sum(dim=2).max() == 1
    assert_equally_likely(drawn)
    assert_equally_likely(drawn.unflatten(1, (10, 3)).any(dim=2))


def test_the_number_of_operations_does_not_grow_with_the_batch():
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.total += 1
            return function(*args, **(kwargs or {}))

    totals = set()
    for batch in (2, 3, 9):
        Count.total = 0
        with Count():
            draw(IoUBalancedSampler(max_iou=None, max_negatives_per_positive=3), *crowded_image(), times=batch)
        totals.add(Count.total)
    assert len(totals) == 1


def test_a_batch_waits_for_the_device_once(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    image = crowded_image()
    draw(IoUBalancedSampler(), *image, times=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        draw(IoUBalancedSampler(), *image, times=8)
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1


def test_drawing_again_gives_another_subset():
    labels = torch.arange(100) % 2
    image = labels, labels.float(), labels
    (first, _), (second, _) = draw(IoUBalancedSampler(20, 1.0), *image), draw(IoUBalancedSampler(20, 1.0), *image)
    assert first.sum() == second.sum() == 20
    assert not (first & (labels == 0)).any()
    assert not torch.equal(first, second)


@given(
    elements=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2)), max_size=30),
    seed=st.integers(0, 2**31),
)
def test_positions_count_up_in_every_group_by_priority(elements, seed):
    torch.manual_seed(seed)
    columns = torch.tensor(elements, dtype=torch.int64).reshape(-1, 2).T
    position = random_position(10 * columns[0] + columns[1], columns[0])
    for group in {group for group, _ in elements}:
        members = [i for i, element in enumerate(elements) if element[0] == group]
        members.sort(key=lambda i: position[i])
        assert position[members].tolist() == list(range(len(members)))
        assert [elements[i][1] for i in members] == sorted(elements[i][1] for i in members)


@pytest.mark.parametrize(
    ("available", "quota", "shares"),
    [
        ([50, 50, 50, 3, 3, 3], 128, [40, 40, 39, 3, 3, 3]),
        ([300, 2], 128, [126, 2]),
        ([200, 10, 10, 10], 128, [98, 10, 10, 10]),
        ([2] * 80, 128, [2] * 48 + [1] * 32),
        ([5] * 10, 4, [1] * 4 + [0] * 6),
        ([2, 3], 128, [3, 2]),
    ],
)
def test_ground_truths_share_the_positives_equally(available, quota, shares):
    matched_idxs = torch.arange(len(available)).repeat_interleave(torch.tensor(available))
    matched_idxs = matched_idxs[torch.randperm(len(matched_idxs))]
    labels = torch.ones_like(matched_idxs)
    positives, _ = draw(IoUBalancedSampler(4 * quota), labels, labels.float(), matched_idxs)
    drawn = matched_idxs[positives].bincount(minlength=len(available)).tolist()
    assert sorted(drawn, reverse=True) == shares
    assert all(share <= limit for share, limit in zip(drawn, available, strict=True))


def all_negative(*ious: float) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.zeros(len(ious), dtype=torch.int64)
    return nothing, torch.tensor(ious), nothing


@pytest.mark.parametrize("num_bins", [2, 3, 5])
def test_an_iou_on_an_edge_belongs_to_the_bin_above_and_the_last_bin_is_closed(num_bins):
    ious = torch.tensor([*(k / (2 * num_bins) for k in range(num_bins + 1)), 0.7, 1.0])
    assert iou_bins(ious, 0.0, 0.5, num_bins).tolist() == [*range(num_bins), *[num_bins - 1] * 3]


def test_bins_begin_at_the_floor():
    ious = torch.tensor([0.0, 0.09, 0.125, 0.2, 0.3125, 0.5])
    assert iou_bins(ious, 0.125, 0.5, 2).tolist() == [-1, -1, 0, 0, 1, 1]


@pytest.mark.parametrize(("max_iou", "hardest"), [(0.5, 0.5), (0.5, 0.9), (None, 0.4)])
def test_the_hardest_negative_is_in_the_last_bin(max_iou, hardest):
    _, negatives = draw(IoUBalancedSampler(2, num_bins=2, max_iou=max_iou), *all_negative(*[0.0] * 1000, hardest))
    assert negatives[-1]


@pytest.mark.parametrize("label", [-1, 1])
def test_without_max_iou_bins_reach_to_the_best_candidate_of_any_label(label):
    labels, ious, matched_idxs = all_negative(*[0.1] * 500, 0.45, 0.8)
    labels[-1] = label
    sampler = IoUBalancedSampler(3, num_bins=2, max_iou=None, positive_fraction=0.34)
    _, negatives = draw(sampler, labels, ious, matched_idxs, times=20)
    assert negatives[:, -2].all()


def test_floor_fraction_is_drawn_from_below_the_floor():
    sampler = IoUBalancedSampler(10, num_bins=2, floor_iou=0.125, floor_fraction=0.25, max_iou=0.625)
    image = all_negative(*[0.0] * 50, *[0.2] * 50, *[0.5] * 50)
    _, negatives = draw(sampler, *image, times=50)
    below, *bins = negatives.split(50, dim=1)
    assert (below.sum(dim=1) == 2).all()  # 2.5, rounded
    assert all((each.sum(dim=1) == 4).all() for each in bins)


def test_below_the_floor_only_fills_without_a_fraction():
    sampler = IoUBalancedSampler(10, num_bins=2, floor_iou=0.125)
    _, negatives = draw(sampler, *all_negative(*[0.0] * 50, *[0.2] * 3, *[0.4] * 4), times=20)
    assert negatives[:, 50:].all()
    assert (negatives[:, :50].sum(dim=1) == 3).all()


@pytest.mark.parametrize(
    ("ratio", "num_positives", "num_negatives"),
    [(3, 2, 6), (2.5, 3, 7), (3, 0, 3), (0, 2, 0), (100, 2, 38), (None, 0, 40)],
)
def test_negatives_can_be_limited_by_the_positives(ratio, num_positives, num_negatives):
    labels = (torch.arange(100) < num_positives).long()
    sampler = IoUBalancedSampler(40, max_negatives_per_positive=ratio)
    positives, negatives = draw(sampler, labels, torch.rand(100) / 2, torch.zeros_like(labels))
    assert (positives.sum(), negatives.sum()) == (num_positives, num_negatives)


@pytest.mark.parametrize(
    ("labels", "num_positives", "num_negatives"),
    [([], 0, 0), ([3] * 9, 2, 0), ([-1] * 9, 0, 0), ([0] * 9, 0, 8), ([0] * 2 + [1], 1, 2)],
    ids=["no candidates", "all positive", "all ignored", "all negative", "too few"],
)
@pytest.mark.parametrize("max_iou", [0.5, None])
def test_one_sided_images(labels, num_positives, num_negatives, max_iou):
    labels = torch.tensor(labels, dtype=torch.int64)
    sampler = IoUBalancedSampler(8, max_iou=max_iou)
    positives, negatives = draw(sampler, labels, torch.zeros(len(labels)), torch.zeros_like(labels))
    assert positives.shape == negatives.shape == labels.shape
    assert (positives.sum(), negatives.sum()) == (num_positives, num_negatives)


def test_a_batch_of_no_images_and_a_quota_of_no_boxes_give_nothing():
    assert IoUBalancedSampler()([], [], []) == ([], [])
    positives, negatives = draw(IoUBalancedSampler(0), *crowded_image())
    assert not positives.any()
    assert not negatives.any()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size_per_image", -1),
        ("batch_size_per_image", 512.0),
        ("positive_fraction", 1.5),
        ("positive_fraction", math.nan),
        ("num_bins", 0),
        ("num_bins", 2.5),
        ("max_iou", 0.0),
        ("max_iou", 1.1),
        ("max_iou", math.nan),
        ("floor_iou", -1),
        ("floor_iou", 1.0),
        ("floor_fraction", -0.1),
        ("max_negatives_per_positive", -1),
        ("max_negatives_per_positive", math.nan),
    ],
)
def test_wrong_setting_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*, got {value}"):
        IoUBalancedSampler(**{argument: value})


def test_floor_above_the_ceiling_is_an_error():
    with pytest.raises(ValueError, match=r"max_iou must be above floor_iou=0\.6 .* got 0\.5"):
        IoUBalancedSampler(floor_iou=0.6)


LABELS, IOUS = torch.zeros(3, dtype=torch.int64), torch.zeros(3)


def test_strided_and_half_precision_tensors_are_read_right():
    labels, ious, matched_idxs = crowded_image()
    expected = draw(IoUBalancedSampler(10**6, 1.0), labels, ious, matched_idxs)
    strided = [torch.stack([tensor, tensor]).T[:, 0] for tensor in (labels, ious, matched_idxs)]
    halves = labels, ious.to(torch.bfloat16), matched_idxs
    for image in (strided, halves):
        for ours, theirs in zip(draw(IoUBalancedSampler(10**6, 1.0), *image), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moves_no_edge(dtype):
    third = torch.tensor(0.5 / 3).to(dtype)
    is_above = third.double() >= 0.5 / 3
    ious = torch.cat([torch.zeros(50, dtype=dtype), third.repeat(2), torch.full((50,), 0.4, dtype=dtype)])
    nothing = torch.zeros(102, dtype=torch.int64)
    _, negatives = draw(IoUBalancedSampler(30), nothing, ious, nothing, times=20)
    of_third = negatives[:, 50:52].sum(dim=1)
    assert (of_third == 2).all() if is_above else (of_third < 2).any()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((LABELS, [IOUS], [LABELS]), TypeError, "labels must be a list with one tensor an image, got Tensor"),
        (([LABELS], [IOUS, IOUS], [LABELS]), ValueError, "ious must have one tensor for each of the 1 images, got 2"),
        (([LABELS], [IOUS], []), ValueError, "matched_idxs must have one tensor for each of the 1 images, got 0"),
        (([LABELS], [[0.0] * 3], [LABELS]), TypeError, "ious[0] must be a tensor, got list"),
        (([LABELS], [IOUS[:2]], [LABELS]), ValueError, "ious[0] must have the shape [M] of labels[0], [3], got [2]"),
        (([LABELS[None]], [IOUS], [LABELS]), ValueError, "labels[0] must have the shape [M]"),
        (([LABELS], [IOUS], [LABELS.to("meta")]), ValueError, "matched_idxs[0] must be on the device of labels[0]"),
        (([LABELS.int()], [IOUS], [LABELS]), TypeError, "labels[0] must be int64, got torch.int32"),
        (([LABELS], [LABELS], [LABELS]), TypeError, "ious[0] must be of a floating-point type, got torch.int64"),
        (([LABELS], [IOUS], [IOUS]), TypeError, "matched_idxs[0] must be int64, got torch.float32"),
        (
            ([LABELS] * 2, [IOUS, IOUS / torch.tensor([1, 0, 1])], [LABELS] * 2),
            ValueError,
            "ious[1] has a NaN at index 1",
        ),
    ],
)
def test_wrong_batch_is_named(batch, error, message):
    with pytest.raises(error, match=re.escape(message)):
        IoUBalancedSampler()(*batch)
