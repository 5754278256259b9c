"""Ask a model one question, with its chat template and greedy decoding.

    python examples/smolmoe/ask.py FOLDER "What is the capital of France?"

A Hugging Face folder is answered by transformers. A Megatron checkpoint is answered by Megatron, if `ramoe
convert` wrote it or `ramoe finetune` made it of a converted one.
"""

import argparse
import contextlib
import os
import socket
import sys
from pathlib import Path

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline_job import offline_job
from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.models.families import CONFIG
from ramoe_megatron.models.note import FLAGS, ORIGINAL, note_in

MAX_NEW_TOKENS = 32


def main() -> None:
    """Print the engine's name and the answer."""
    parser = argparse.ArgumentParser(prog="ask.py")
    parser.add_argument("folder", type=Path, help="a Hugging Face folder or a Megatron checkpoint")
    parser.add_argument("question")
    options = parser.parse_args()
    if note_in(options.folder):
        print(f"Megatron: {megatron_answer(options.folder, options.question)}")
    elif (options.folder / CONFIG).is_file():
        print(f"transformers: {transformers_answer(options.folder, options.question)}")
    else:
        raise RamoeError(
            f"{options.folder}: neither a Hugging Face folder ({CONFIG}) nor a checkpoint of "
            "`ramoe convert`; give a folder that make_model.py, `ramoe convert`, `ramoe run` or "
            "`ramoe export` wrote"
        )


def transformers_answer(folder: Path, question: str) -> str:
    """The answer of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def megatron_answer(checkpoint: Path, question: str) -> str:
    """The answer of a Megatron checkpoint with a note, in this process as the only rank."""
    import yaml

    from ramoe_megatron.recipe.megatron_flags import render

    flags = yaml.safe_load((checkpoint / FLAGS).read_text(encoding="utf-8"))
    flags |= {"seq-length": 256, "micro-batch-size": 1, "load": str(checkpoint)}
    flags |= {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(checkpoint / ORIGINAL)}
    sys.argv[1:] = render(flags)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as in the recipe: a GPU would need transformer-engine
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= alone | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": "?"})
    example = Example("question", "en", "question", question, "?", "?", None, "test", turns)
    # Megatron's own output goes to stderr, so that stdout is the answer
    with contextlib.redirect_stdout(sys.stderr), offline_job() as (args, _, options):
        from ramoe_megatron.data.encode import decoding
        from ramoe_megatron.mcore.offline.model import OfflineModel
        from ramoe_megatron.mcore.offline.scoring import greedy

        model = OfflineModel(args, options.batch_tokens)
        asked = decoding(example, model.tokenizer)
        [ids] = greedy(model, [asked.prompt], MAX_NEW_TOKENS, stops=[asked.stops])
        return asked.answer(ids, model.tokenizer)


if __name__ == "__main__":
    run_job(main)
