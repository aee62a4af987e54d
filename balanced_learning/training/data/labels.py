"""The labels that a detector gives to the categories of a data set."""

from dataclasses import dataclass
from typing import Any

from balanced_learning.training.data.coco import Split
from balanced_learning.training.errors import UserError


@dataclass(frozen=True)
class Labels:
    """Maps category ids to the labels of a model and back. Label 0 is the background.

    Attributes:
        names: by label, the name of the category.
        category_ids: by label, the id of the category in the data set.
        num_classes: size of the model's output, background included.
    """

    names: dict[int, str]
    category_ids: dict[int, int]
    num_classes: int

    @classmethod
    def of(cls, split: Split) -> "Labels":
        """Labels 1, 2, ... in the order of the category ids."""
        category_ids = dict(enumerate(sorted(split.categories), 1))
        names = {label: split.categories[category_id] for label, category_id in category_ids.items()}
        return cls(names, category_ids, len(names) + 1)

    @classmethod
    def by_name(cls, split: Split, known: dict[int, str], num_classes: int) -> "Labels":
        """The labels that ``known`` gives to the names of the categories, all of which it must have."""
        label_of = {name: label for label, name in known.items()}
        names = {label_of[name]: name for name in split.categories.values()}
        category_ids = {label_of[name]: category_id for category_id, name in split.categories.items()}
        return cls(names, category_ids, num_classes)

    @property
    def label_of(self) -> dict[int, int]:
        """The label of each category id."""
        return {category_id: label for label, category_id in self.category_ids.items()}

    def check(self, split: Split, source: Any) -> None:
        """Compares with the categories of a data set.

        Raises:
            UserError: if they are others than those of ``source``, the checkpoint that the labels are from.
        """
        own = {category_id: self.names[label] for label, category_id in self.category_ids.items()}
        if own != split.categories:
            odd = min(set(own.items()) ^ set(split.categories.items()))
            raise UserError(f"{source}: trained on other categories than {split.json_file} has, such as {odd}")


def class_name(names: dict[int, str], label: int) -> str:
    """The name of a label. The weights may know classes that the data has no name for."""
    return names.get(label, f"class {label}")
