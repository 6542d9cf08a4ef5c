"""From a checkpoint to its module: nothing in the file runs that is not from this package or PyTorch, or trusted."""

from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule

from maml_lightning.analysis.calibration import kept
from maml_lightning.episodes import InputSpec
from maml_lightning.errors import SettingError
from maml_lightning.training.checkpoints import read_checkpoint, settings_of
from maml_lightning.training.trust import build, check_settings

Module = TypeVar("Module", bound=LightningModule)


def load_module(
    module_class: type[Module],
    path: str | Path,
    given: Mapping[str, Any],
    map_location: torch.device | str | None,
    strict: bool,
    trust: bool,
) -> Module:
    """The module of a checkpoint that fit wrote, see `MAML.load_from_checkpoint`."""
    source = f"The checkpoint {path}"
    content = read_checkpoint(Path(path), "checkpoint_path")
    saved = {key: value for key, value in settings_of(content, module_class).items() if key not in given}
    if "net" not in given and not isinstance(saved.get("net"), dict):
        raise SettingError(f"{source} does not name its network; use MAML.load_from_checkpoint(path, net=...).")
    if not trust:
        trusted = "trust=True (--trust_checkpoint true) if you trust the file"
        check_settings(saved, source, remedy=f"give net=..., loss=..., metric=... by hand, or {trusted}")
    for kind in ("net", "loss", "metric"):
        if isinstance(saved.get(kind), dict):
            saved[kind] = build(kind, saved[kind], source)
    if isinstance(saved.get("metric"), str):
        saved["metric"] = locate(saved["metric"])
    if isinstance(saved.get("loss"), str | None) and "loss" in saved:
        path, saved["loss"] = saved["loss"], locate(saved["loss"]) if saved["loss"] else F.cross_entropy
        if not callable(saved["loss"]) or isinstance(saved["loss"], type):
            raise SettingError(
                f"{source} was trained with loss {path}, which it cannot restore; give loss=... by hand."
            )
    try:
        module = module_class(**saved, **given)
    except TypeError as error:
        raise SettingError(f"{source} holds unusable settings ({error}); give them by hand.") from error
    if strict:
        module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"], strict=strict)
    return module if map_location is None else module.to(map_location)


def loss_path(loss: Any) -> str:
    """The import path of a loss, or of its class or what it is part of where it has none."""
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def to_keep(chosen: Mapping[Any, int], inputs: InputSpec | None, calibration: dict[str, Any] | None) -> dict[str, Any]:
    """What `measured` finds in a checkpoint."""
    spec = None if inputs is None else inputs._asdict()
    return {"tasks_per_chunk": dict(chosen), "inputs": spec, "calibration": calibration}


def measured(checkpoint: dict[str, Any]) -> tuple[dict[Any, int], InputSpec | None, dict[str, Any] | None]:
    """The chunk sizes that a checkpoint's run measured, the pictures that it was trained on, and its calibration."""
    chosen, inputs, calibration = (checkpoint.get(key) for key in ("tasks_per_chunk", "inputs", "calibration"))
    optional = set(InputSpec._field_defaults)  # which checkpoints of earlier releases lack
    known = isinstance(inputs, dict) and set(inputs) | optional == set(InputSpec._fields)
    spec = InputSpec(**inputs) if known else None  # type: ignore[arg-type]
    return dict(chosen) if isinstance(chosen, dict) else {}, spec, kept(calibration)
