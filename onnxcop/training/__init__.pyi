"""The pieces of a training loop, by the modules that define them; loaded on first use (see `__init__.py`)."""

from .distill import Distilled as Distilled
from .distill import DistillOptions as DistillOptions
from .distill import distill as distill
from .objectives import Objective as Objective
from .objectives import objective as objective
from .schedule import Schedule as Schedule
from .step import Optimizer as Optimizer
from .step import StepGraph as StepGraph
from .step import WeightLayout as WeightLayout
from .step import build_step as build_step
from .step import own_weights as own_weights
from .step import with_weights as with_weights
from .trainer import StepResult as StepResult
from .trainer import Trainer as Trainer
from .trainer import TrainingState as TrainingState
