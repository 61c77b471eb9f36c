"""Ray Train's trainer, without what ends healthy trainings.

Its `PlacementGroupCleaner` asks Ray's dashboard every second whether the controller lives, and
takes an empty answer, as an overloaded one gives, for its death: it then takes the workers'
resources away (Ray 2.60). It is there for jobs that outlive a controller. A stage does not: it
fails with its controller, and Ray takes back what a job had when it ends.
"""

from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):
    """A `TorchTrainer` whose workers end with the job alone."""

    def _create_default_callbacks(self) -> list[object]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ != "PlacementGroupCleanerCallback"]
