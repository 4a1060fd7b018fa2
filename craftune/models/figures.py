"""A recipe's checkpoint, counted: from the table of published ones, or from its config files."""

from pathlib import Path

from craftune.assumed import Figures
from craftune.config import LoraConfig, ModelConfig
from craftune.errors import UserError
from craftune.models import EMBEDDED, resolve
from craftune.models.published import PUBLISHED, published

CONFIGS = ("*/config.json", "scheduler/scheduler_config.json")


def figures(config: ModelConfig, lora: LoraConfig, checkpointing: bool) -> Figures:
    """Count without weights; of a hub id that is not in the table, only .json files are fetched.

    Raises:
        UserError: there is no such folder or hub id, or its configs cannot be counted.
    """
    path = resolve(config.path)
    known = None if path.is_dir() else published(config.path, lora, checkpointing)
    if known is not None:
        return known
    from craftune.models.counting import configs, count

    if not path.is_dir() and config.path in PUBLISHED:
        return count(PUBLISHED[config.path], lora, checkpointing)
    folder = path if path.is_dir() else _configs_of_hub(config)
    return count(configs(folder), lora, checkpointing)


def _configs_of_hub(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = config.path
    if name.startswith((".", "/", "~", EMBEDDED)) or name.endswith(".safetensors"):
        raise UserError(f"model.path {name!r}: no such folder; a plan needs its config.json files")
    try:
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=list(CONFIGS)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path {name!r}: not counted in advance, and the hub did not give its config "
            f"files ({reason}); plan with a local folder or one of {', '.join(PUBLISHED)}"
        ) from None
