import pytest
import torch
from PIL import Image

from balanced_learning.training.data.augmentation import augmentation
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.dataset import DetectionDataset, Share
from balanced_learning.training.errors import UserError


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_every_kind_of_image_is_rgb_in_unit_range(coco_root, mode):
    file = coco_root / "train2017" / "11.png"
    Image.new("RGB", (64, 48), "white").convert(mode).save(file, format="TIFF" if mode == "CMYK" else "PNG")
    image, _ = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2})[0]
    assert (image.shape, image.dtype, image.max()) == ((3, 48, 64), torch.float32, 1)


def test_targets_are_clamped_xyxy_boxes_with_mapped_labels(coco_root, edit):
    edit(lambda content: content["annotations"][0].update(bbox=[-5, 40, 20, 30]))
    _, target = DetectionDataset(read_split(coco_root, "train2017"), {90: 2, 3: 1})[0]
    assert target["boxes"].tolist() == [[0, 40, 15, 48]]
    assert target["labels"].tolist() == [2]
    assert target["image_id"] == 11
    assert type(target["boxes"]) is torch.Tensor


def test_an_image_without_boxes_has_an_empty_target(coco_root, edit):
    edit(lambda content: content.update(annotations=[]))
    dataset = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2}, transforms=augmentation("hflip"))
    _, target = dataset[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


@pytest.mark.parametrize("name", ["none", "hflip", "multiscale", "lsj", "ssd", "ssdlite"])
def test_augmentation_keeps_boxes_inside_and_beside_their_labels(coco_root, name):
    dataset = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2}, transforms=augmentation(name))
    for dataset.epoch in range(10):
        image, target = dataset[0]
        height, width = image.shape[-2:]
        boxes = target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert len(target["labels"]) == len(boxes)


def test_a_flip_mirrors_the_boxes(coco_root):
    dataset = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2}, transforms=augmentation("hflip"))
    seen = set()
    for dataset.epoch in range(30):
        seen.add(tuple(dataset[0][1]["boxes"][0].tolist()))
    assert seen == {(4, 4, 34, 24), (30, 4, 60, 24)}


TURNED = {  # the box [4, 4, 30, 20] of the stored pixels in the upright image
    1: [4, 4, 34, 24],
    2: [30, 4, 60, 24],
    3: [30, 24, 60, 44],
    4: [4, 24, 34, 44],
    5: [4, 4, 24, 34],
    6: [24, 4, 44, 34],
    7: [24, 30, 44, 60],
    8: [4, 30, 24, 60],
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(
    ("orientation", "is_upright"), [*((i, True) for i in TURNED), *((i, False) for i in range(5, 9))]
)
def test_boxes_lie_on_the_objects_of_turned_images(coco_root, edit, orientation, is_upright, suffix):
    pixels = Image.new("RGB", (64, 48), "navy")
    pixels.paste("yellow", (4, 4, 34, 24))
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels.save(coco_root / "train2017" / f"1.{suffix}", exif=exif)
    left, top, right, bottom = TURNED[orientation if is_upright else 1]
    width, height = (48, 64) if is_upright and orientation > 4 else (64, 48)

    def annotate(content):
        content["images"][0].update(file_name=f"1.{suffix}", width=width, height=height)
        content["annotations"][0].update(bbox=[left, top, right - left, bottom - top])

    edit(annotate)
    image, target = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2})[0]
    assert image.shape == (3, height, width)
    assert target["boxes"].tolist() == [[left, top, right, bottom]]
    is_object = (image[0] > 0.5).nonzero()
    assert is_object.min(dim=0).values.tolist() == pytest.approx([top, left], abs=1)
    assert is_object.max(dim=0).values.tolist() == pytest.approx([bottom - 1, right - 1], abs=1)


def test_an_image_of_another_size_since_the_check_is_named(coco_root):
    dataset = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2})
    file = coco_root / "train2017" / "11.png"
    Image.new("RGB", (32, 24)).save(file)
    with pytest.raises(UserError, match=f"{file} is now 32 x 24, not 64 x 48"):
        dataset[0]


def test_an_image_spoilt_since_the_check_is_named(coco_root):
    dataset = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2})
    file = coco_root / "train2017" / "11.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=f"{file} is unreadable"):
        dataset[0]


def test_batches_are_handed_over_as_bytes_and_hold_the_same_images_on_the_device(coco_root):
    colors = [(0, 51, 255), (17, 128, 254)]
    for name, color in zip(("11.png", "12.png"), colors, strict=True):
        Image.new("RGB", (64, 48), color).save(coco_root / "train2017" / name)
    dataset = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2}, transforms=augmentation("hflip"))
    batch = dataset.__getitems__(Share([0, 1], images=2, step=0))
    assert [image.dtype for image in batch.images] == [torch.uint8] * 2
    for image, alone, color in zip(batch.to("cpu").images, (dataset[0][0], dataset[1][0]), colors, strict=True):
        assert image.equal(alone)
        assert image[:, 0, 0].tolist() == pytest.approx([channel / 255 for channel in color], abs=1e-7)
