"""Shared code of the offline jobs (jobs that run only forward passes): options, inputs and progress lines."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramoe_megatron.artifacts.checkpoints import TRACKER
from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import digests
from ramoe_megatron.data.encode import Tokenizer, check_examples
from ramoe_megatron.data.limits import new_token_limits
from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor
from ramoe_megatron.data.sources import local_files
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.entry import CHECKPOINT_FIX, DATA_FIX, FILE_FIX, FORWARD_ONLY_FLAGS
from ramoe_megatron.mcore.arguments import DataOptions, arguments_with
from ramoe_megatron.mcore.checkpoint import named, require_checkpoint
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import megatron_arguments
from ramoe_megatron.mcore.progress import ProgressLines as ProgressLines
from ramoe_megatron.mcore.start import Start, Step
from ramoe_megatron.mcore.trial import tokenizer_flags

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel


@dataclass(frozen=True)
class OfflineOptions:
    """Options of the offline jobs, which run only forward passes."""

    output: str | None = None
    """Output folder of the job. Required."""

    batch_tokens: int = 4096
    """Maximum number of tokens in a micro-batch on one rank."""

    max_new_tokens: int | None = None
    """Maximum length of a generated answer in tokens, including the end token. Applies to examples without
    choices. A limit that is shorter than a gold answer is an error. Default: 16, or the length of the longest
    gold answer if that is more."""

    def limits(self, args: Any, examples: Iterable[Example], tokenizer: Tokenizer) -> list[int]:
        """Maximum number of new tokens of each example that is scored (`new_token_limits`).

        Raises:
            RamoeError: no model can answer an example correctly within the limits.
        """
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RamoeError(f"--ramoe-max-new-tokens {self.max_new_tokens}: expected at least 1")
        return new_token_limits(list(examples), tokenizer, self.max_new_tokens, args.max_position_embeddings)


@contextmanager
def offline_job(*options: type) -> Iterator[tuple[Any, DataOptions, OfflineOptions]]:
    """Parse the arguments of a script that is not a `Job`. Uses the CPU backend if there is no CUDA device.

    Yields:
        The validated arguments, the data options and the offline options.
    """
    groups = (DataOptions, OfflineOptions, *options)
    with megatron_arguments(arguments_with(*groups), FORWARD_ONLY_FLAGS, options=groups) as args:
        yield args, options_from_args(DataOptions, args), options_from_args(OfflineOptions, args)


@dataclass(frozen=True)
class OfflineInputs:
    """Inputs of every offline job. `examples` and `output` are steps of the job's `Start`."""

    args: Any
    data: DataOptions
    options: OfflineOptions
    examples: Step[list[Example]]
    """Examples of the chosen languages and always of the anchor."""
    output: Step[Path]

    def pairs(self, start: Start) -> Step[list[tuple[Example, Example]]]:
        """(anchor view, target view) of the examples, for jobs that compare languages. At least one pair."""

        def look() -> list[tuple[Example, Example]]:
            pairs = pair_with_anchor(self.examples.value, self.data.anchor)
            if not pairs:
                raise RamoeError(
                    f"{', '.join(self.data.data)}: only {self.data.anchor!r} rows in split "
                    f"{self.data.split!r}; nothing to compare. Add rows in the target languages, or give "
                    "another --ramoe-split"
                )
            return pairs

        return start.step("data", look, None, DATA_FIX)

    def limits(self, start: Start, scored: Callable[[], Sequence[Example]]) -> Step[list[int]]:
        """The step that finds the token limit of each scored example (`OfflineOptions.limits`).

        This step is the expensive part of a check.
        """

        def look() -> list[int]:
            examples, tokenizer = scored(), start.tokenizer.value
            key = (
                "limits",
                _choice(self.data),
                len(examples),
                self.options.max_new_tokens,
                self.args.max_position_embeddings,
            )
            kept = (*key, tokenizer_flags(self.args))
            return start.once(kept, lambda: self.options.limits(self.args, examples, tokenizer))

        return start.step("data", look, None, DATA_FIX)


def read_offline(start: Start, args: Any, data: DataOptions | None = None) -> OfflineInputs:
    """The shared steps of the offline jobs: the output folder, the data and the checkpoint.

    Args:
        data: data options of the job. Default: the options from the flags.
    """
    data, options = data or options_from_args(DataOptions, args), options_from_args(OfflineOptions, args)

    def examples() -> list[Example]:
        if not data.data:
            raise RamoeError(
                "--ramoe-data is missing: expected JSONL files, folders of them, or the name of a data set"
            )
        return start.once(("examples", _choice(data)), lambda: examples_with_anchor(data))

    def output() -> Path:
        if options.output is None:
            raise RamoeError("--ramoe-output is missing: expected the folder to write to")
        return Path(options.output)

    folder = start.step("output", output, str, "give the folder")
    read = start.step(
        "data", examples, lambda found: f"{len(found)} examples of split {data.split}", DATA_FIX, data.data
    )
    read_conversations(start, args, read, _choice(data))
    start.step(
        "checkpoint",
        lambda: require_checkpoint(args.load, "--load"),
        lambda _: named(args.load),
        CHECKPOINT_FIX,
        [args.load],
    )
    return OfflineInputs(args, data, options, read, folder)


def read_conversations(
    start: Start, args: Any, examples: Step[list[Example]], choice: object, check: str = "data"
) -> None:
    """The step that tries the tokenizer and its chat template on all examples (`check_examples`).

    Args:
        choice: key of the examples; command lines with the same key and tokenizer are tried once.
        check: name of the step.
    """

    def look() -> None:
        found, tokenizer = examples.value, start.tokenizer.value
        start.once(("conversations", choice, tokenizer_flags(args)), lambda: check_examples(found, tokenizer))

    start.step(check, look, None, DATA_FIX)


def _choice(data: DataOptions) -> tuple[Any, ...]:
    """The options that determine the examples of an offline job."""
    return (data.data, data.split, data.languages, data.anchor, data.columns)


def given(path: str | None, flag: str) -> str:
    """The value of a flag that names a file of an earlier job. Raises RamoeError when the flag is missing."""
    if path is None:
        raise RamoeError(
            f"--ramoe-{flag} is missing: expected the file that `ramoe taxonomy` or `ramoe profile` wrote"
        )
    return path


def moe_layers(start: Start, args: Any) -> int:
    """Number of MoE layers of the model that the flags describe."""
    from ramoe_megatron.mcore.router import configured_moe_layer_numbers

    return len(configured_moe_layer_numbers(start.config.value, args.hybrid_layer_pattern))


def fitting_experts(start: Start, args: Any, path: str | None) -> ExpertFile:
    """The expert file.

    Raises:
        RamoeError: the file cannot be read, or was made with another model than the flags describe.
    """
    experts, config = ExpertFile.load(given(path, "experts")), start.config.value
    experts.check_model(
        moe_layers(start, args),
        config.num_moe_experts,
        config.moe_router_topk,
        config.moe_router_score_function,
    )
    return experts


def read_experts(start: Start, args: Any, path: str | None) -> Step[ExpertFile]:
    """The step that reads an expert file."""
    return start.step(
        "expert file",
        lambda: fitting_experts(start, args, path),
        lambda e: f"{len(e.tasks)} tasks",
        FILE_FIX,
        [path],
    )


def examples_with_anchor(options: DataOptions, split: str | None = None) -> list[Example]:
    """The examples of the chosen languages and always of the anchor."""
    languages = None if options.languages is None else sorted({*options.languages, options.anchor})
    return load_examples(options.data, options.column_mapping(), split or options.split, languages)


def data_digests(sources: Sequence[str]) -> list[dict[str, str]]:
    """Path and sha256 of every local file of the sources. A Hugging Face name gets the digest "hub"."""
    entries: list[dict[str, str]] = []
    for source in sources:
        files = local_files(source)
        entries += digests(files) if files else [{"path": source, "sha256": "hub"}]
    return entries


def checkpoint_name(folder: str) -> str:
    """Name of the checkpoint in artefacts: FOLDER@ITERATION."""
    path = Path(folder)
    return f"{path.name}@{(path / TRACKER).read_text().strip()}"


def write_on_rank_0(model: "OfflineModel", write: Any) -> None:
    """Call `write` on rank 0. Every rank waits, so no rank exits before the files are written."""
    import torch

    if torch.distributed.get_rank() == 0:
        write()
    torch.distributed.barrier()
