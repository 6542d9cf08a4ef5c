"""Where the sampling of episodes was in version 0.1.0; import from `maml_lightning.data` instead."""

from maml_lightning.deprecation import old_names

__getattr__ = old_names(
    __name__,
    {
        "Split": "maml_lightning.data.Split",
        "TaskDataset": "maml_lightning.data.TaskDataset",
        "EpisodeDataset": "maml_lightning.data.EpisodeDataset",
        "EpisodeSampler": "maml_lightning.data.loading.EpisodeSampler",
        "EpisodeLoader": "maml_lightning.data.loading.EpisodeLoader",
        "TaskDataModule": "maml_lightning.data.TaskDataModule",
        "EpisodicDataModule": "maml_lightning.data.EpisodicDataModule",
        "random_bits": "maml_lightning.data.random_numbers.random_bits",
        "below": "maml_lightning.data.random_numbers.below",
        "choose": "maml_lightning.data.random_numbers.choose",
        "at_least": "maml_lightning.data.checks.at_least",
    },
)
