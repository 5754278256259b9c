"""The families that can be converted, and which family a folder holds."""

from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import read_json
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models.decoder import Family
from ramoe_megatron.models.gpt_oss import GPT_OSS
from ramoe_megatron.models.mixtral import MIXTRAL
from ramoe_megatron.models.olmoe import OLMOE
from ramoe_megatron.models.phimoe import PHIMOE
from ramoe_megatron.models.qwen3_moe import QWEN3_MOE

FAMILIES = (QWEN3_MOE, MIXTRAL, OLMOE, PHIMOE, GPT_OSS)
CONFIG = "config.json"


def family_of(folder: Path) -> tuple[Family, Any]:
    """The family of a Hugging Face folder, and its configuration.

    Raises:
        RamoeError: there is no config.json, the architecture is unknown, the model is quantised, or the
            configuration has something that Megatron cannot express.
    """
    from transformers import AutoConfig

    path = folder / CONFIG
    if not path.is_file():
        raise RamoeError(
            f"{folder}: no {CONFIG}; expected a folder that save_pretrained wrote or that was downloaded "
            "from the hub"
        )
    document = read_json(path)
    architectures = document.get("architectures") or []
    family = next((found for found in FAMILIES if found.architecture in architectures), None)
    if family is None:
        known = ", ".join(found.architecture for found in FAMILIES)
        raise RamoeError(
            f"{path}: architectures is {architectures}; expected one of {known}. "
            "For other families, Megatron-Bridge converts on a machine with CUDA and transformer-engine"
        )
    quantised = (document.get("quantization_config") or {}).get("quant_method")
    if quantised and (quantised, family) != ("mxfp4", GPT_OSS):
        raise RamoeError(
            f"{path}: quantization_config is {quantised}; only the MXFP4 of GPT-OSS is read. "
            "Give the unquantised model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a wrong value
        raise RamoeError(f"{path}: transformers cannot read it ({error})") from error
    if reason := family.refuse(config):
        raise RamoeError(f"{path}: {reason}")
    return family, config
