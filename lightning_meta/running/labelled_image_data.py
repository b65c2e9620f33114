"""The base class of data modules of labelled images."""

from pathlib import Path
from typing import ClassVar

from lightning_meta.running.data_module import MetaDataModule
from lightning_meta.sources.labelled_images import Dataset, LabelledImages, own_images


class LabelledImageDataModule(MetaDataModule):
    """A data module that reads ``dataset``, its stand-in, or the user's own images (``pictures``)."""

    dataset: ClassVar[type[Dataset]]

    @property
    def users_data(self) -> str | None:
        return self.hparams.pictures

    @property
    def present(self) -> bool:
        return self.dataset.present(self.hparams.root)

    def fetch(self) -> None:
        self.dataset.download(self.hparams.root)

    def read(self) -> LabelledImages:
        """The images; sets ``data_name``.

        Raises:
            InputError: If files are missing or damaged.
        """
        h, dataset = self.hparams, self.dataset
        if self.users_data:
            images = own_images(self.users_data, dataset.size, dataset.grey)
        elif self.use_papers_data(dataset.name, Path(h.root) / dataset.folder, dataset.stand_in):
            images = dataset.read(h.root)
        else:
            images = dataset.read_stand_in()
        self.data_name = images.name
        return images
