"""What users learn of chunks of tasks: what was chosen, and what to set where memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info

from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.devices import of_lost_gpu
from maml_lightning.engine.memory import out_of_memory
from maml_lightning.errors import SettingError


@contextmanager
def naming_what_helps(loop: InnerLoop) -> Iterator[InnerLoop]:
    """Where memory runs out, or the GPU is lost, raise an error that names what to do.

    Raises:
        SettingError: memory ran out, or the GPU stopped.
    """
    try:
        yield loop
    except RuntimeError as error:
        if why := of_lost_gpu(error):
            raise SettingError(why) from error
        if not out_of_memory(error):
            raise
        raise SettingError(
            f"Memory ran out with model.tasks_per_chunk {loop.tasks_per_chunk}: give a smaller number (1 needs least), "
            "--model.flat_memory true, or a smaller data.meta_batch_size."
        ) from error


@contextmanager
def reporting_choices(loop: InnerLoop, tasks: int) -> Iterator[None]:
    """Print what the inner loop chose meanwhile: how many tasks to vectorize together, and whether to recompute steps.

    Args:
        loop: the inner loop.
        tasks: in the meta-batch.
    """
    chosen, flat = dict(loop.chosen), loop.flat
    yield
    size = next((size for what, size in loop.chosen.items() if what not in chosen), None)
    if size and not loop.runs_task_by_task(size):
        rank_zero_info(f"model.tasks_per_chunk: {size} of the {tasks} tasks are vectorized together.")
    if loop.flat and not flat:
        rank_zero_info("model.flat_memory: the backward pass recomputes the inner steps, to save memory.")
