"""Writes the ONNX graph of an exported model, after comparing its outputs with those of PyTorch.

The layout is that of transformers.js: onnx/model.onnx, and onnx/model_quantized.onnx for its dtype "q8". A masked
language model has the output `logits`, an encoder `last_hidden_state`. The graph is traced from the class of
transformers. Its outputs are compared with those of this package's own model, so both steps are checked.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.core import files
from unmask.core.errors import ModelError
from unmask.core.files import RunLayout
from unmask.core.types import SPECIAL, ProgressCallback, Sample, logits_at, pack
from unmask.hub.parity import quiet_transformers, tolerance
from unmask.models.model import Model

GRAPH: Final = "onnx/model.onnx"
QUANTIZED: Final = "onnx/model_quantized.onnx"
PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
OPSET: Final = 18
LOGITS, HIDDEN = "logits", "last_hidden_state"  # names of the outputs

_PARTS: Final = (1.0, 0.75, 0.5, 0.25)  # of the longest sequence: the lengths in a padded batch
_MAX_LENGTH: Final = 256
_MASKED_EVERY: Final = 7  # tokens: about 15 % are masked
_MASKINGS: Final = 3  # of each sequence, without common positions
_PAIR_LOGITS: Final = "prediction_logits"  # of classes with a sentence pair head

Session = Any  # onnxruntime.InferenceSession


@dataclass(frozen=True)
class Int8:
    """The quantized graph beside the float32 graph.

    `agreement` is the share of masked positions at which both predict the same token first. For an encoder it is the
    smallest cosine between the mean-pooled vectors of both.
    """

    agreement: float
    positions: int  # masked positions; of an encoder, the texts
    accuracy: tuple[float, float] | None  # of the first answer in float32 and int8; None for an encoder
    bytes: int


@dataclass(frozen=True)
class OnnxGraph:
    """What was written and compared with PyTorch."""

    inputs: tuple[str, ...]
    output: str  # "logits" or "last_hidden_state"
    opset: int
    onnxruntime: str  # version
    sequences: int
    tokens: int
    difference: float  # largest difference of an output from PyTorch, in float32
    bytes: int
    int8: Int8 | None


def require_onnx() -> None:
    """Check that the packages of the extra `onnx` are installed.

    Raises:
        ModelError: one is missing; the hint is the line that installs it.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"an export to ONNX needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint='install the extra: pip install "unmask[onnx]"',
        )


def write_graph(
    folder: Path, model: Model, texts: Sequence[str], *, int8: bool, on_progress: ProgressCallback | None = None
) -> OnnxGraph:
    """Write the ONNX graph of an exported folder beside its weights, and compare it with PyTorch.

    Args:
        folder: Folder with the weights in the format of transformers.
        model: The exported model.
        texts: Texts for the comparison; parts of them are masked to compare int8 with float32.
        int8: Whether to write a graph with weights of 8 bits too (dynamic quantization of onnxruntime).
        on_progress: Function that is called with the name of the task and the fraction done.

    Raises:
        ModelError: the class can't be traced, an output differs from that of PyTorch, or the graph is too large.
    """
    report = on_progress or _ignore
    report("tracing the model", 0.0)
    inputs = tuple(files.read_json(folder / "tokenizer_config.json")["model_input_names"])
    output = _trace(folder, model, inputs)
    report("comparing with PyTorch", 0.6)
    session, sequences = open_session(folder / GRAPH), encode_cut(model, texts)
    difference = compare_graph(session, model, sequences)
    quantized = None
    if int8:
        report("quantizing", 0.8)
        quantized = _quantize(folder, session, model, sequences, output)
    report("quantizing" if int8 else "comparing with PyTorch", 1.0)
    return OnnxGraph(
        inputs,
        output,
        OPSET,
        importlib.import_module("onnxruntime").__version__,
        len(sequences),
        sum(map(len, sequences)),
        difference,
        (folder / GRAPH).stat().st_size,
        quantized,
    )


def _ignore(task: str, fraction: float) -> None:
    pass


# Tracing --------------------------------------------------------------------------------------------------------------


class _Traced(nn.Module):
    """A model of transformers that takes tensors and returns one tensor."""

    def __init__(self, hf_model: nn.Module, inputs: Sequence[str], output: str) -> None:
        super().__init__()
        self.hf_model, self._inputs, self._output = hf_model, tuple(inputs), output

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the output, (B, S, V) or (B, S, D)."""
        return self.hf_model(**dict(zip(self._inputs, tensors, strict=True)))[self._output]


def _trace(folder: Path, model: Model, inputs: Sequence[str]) -> str:
    """Write the graph of the model in a folder; return the name of its output."""
    import transformers

    architecture = str(files.read_json(folder / RunLayout.CONFIG)["architectures"][0])
    output = HIDDEN if architecture.endswith("Model") else LOGITS
    longest = model.settings.max_position_embeddings
    batch, sequence = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length", max=longest)
    example = tuple(torch.ones(2, min(8, longest), dtype=torch.int64) for _ in inputs)
    with quiet_transformers(), _quiet_export():
        hf_model = getattr(transformers, architecture).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
        )
        name = _PAIR_LOGITS if model.pair is not None and output == LOGITS else output
        (folder / GRAPH).parent.mkdir()
        try:
            torch.onnx.export(
                _Traced(hf_model.eval(), inputs, name),
                example,
                folder / GRAPH,
                input_names=list(inputs),
                output_names=[output],
                opset_version=OPSET,
                dynamic_shapes=(tuple({0: batch, 1: sequence} for _ in inputs),),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # torch and onnx raise errors of many classes
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"{architecture} can't be written as ONNX: {reason}",
                location=model.path,
                hint="use --format hf; or report this message with the versions of torch and transformers",
            ) from error
    _remove_traces(folder / GRAPH)
    return output


def _remove_traces(path: Path) -> None:
    """Remove what torch.onnx stores of each node: names of modules, and stack traces with directories of the author."""
    import onnx

    graph_model = onnx.load(path)
    graph = graph_model.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, graph, graph_model):
        del part.metadata_props[:]
    onnx.save(graph_model, path)


@contextmanager
def _quiet_export() -> Generator[None]:
    """Turn off warnings and log messages of torch.onnx and onnxruntime's quantization below errors."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir"))]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Comparison -----------------------------------------------------------------------------------------------------------


def open_session(graph: Path, threads: int = 1) -> Session:
    """Return a session of onnxruntime on the CPU for a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def run_session(session: Session, sequences: Sequence[NDArray[np.int64]], pad_id: int) -> list[NDArray[np.float32]]:
    """Return the output of a graph for each sequence of a padded batch, without the padding."""
    longest = max(map(len, sequences))
    feeds = {name.name: np.zeros((len(sequences), longest), np.int64) for name in session.get_inputs()}
    feeds["input_ids"][:] = pad_id
    for row, ids in enumerate(sequences):
        feeds["input_ids"][row, : len(ids)] = ids
        feeds["attention_mask"][row, : len(ids)] = 1
    (output,) = session.run(None, feeds)
    return [output[row, : len(ids)] for row, ids in enumerate(sequences)]


def encode_cut(model: Model, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Return the ids of texts, special tokens included, cut to lengths that differ."""
    before, after = model.tokenizer.frame.before, model.tokenizer.frame.after
    longest = max(1, min(model.context, _MAX_LENGTH) - len(before) - len(after))
    sequences: list[NDArray[np.int64]] = []
    for number, ids in enumerate(model.tokenizer.encode_prompts(texts)):
        part = ids[: max(1, int(longest * _PARTS[number % len(_PARTS)]))]
        sequences.append(np.array([*before, *part, *after], np.int64))
    return sequences


@torch.inference_mode()
def compare_graph(session: Session, model: Model, sequences: Sequence[NDArray[np.int64]]) -> float:
    """Return the largest difference of a graph from a model: of each sequence alone, and of padded batches.

    Raises:
        ModelError: the difference exceeds `tolerance`.
    """
    pad_id = model.tokenizer.role_id("pad_token") or 0
    (output,) = (node.name for node in session.get_outputs())
    largest = size = torch.tensor(0.0)
    for first in range(0, len(sequences), len(_PARTS)):
        group = sequences[first : first + len(_PARTS)]
        batch = pack([Sample(ids, np.full(len(ids), SPECIAL, np.uint8)) for ids in group])
        if output == HIDDEN:
            expected_TX = model.encoder(batch)
        else:
            expected_TX = logits_at(model.encoder, model.head, batch, torch.arange(batch.tokens))
        size = torch.maximum(size, expected_TX.abs().max())
        padded = run_session(session, group, pad_id)
        alone = [run_session(session, [ids], pad_id)[0] for ids in group]
        for found in (padded, alone):
            # torch's maximum keeps NaN, which Python's max drops.
            difference_TX = torch.from_numpy(np.concatenate(found)) - expected_TX
            largest = torch.maximum(largest, difference_TX.abs().max())
    limit = tolerance(float(size))
    if not largest <= limit:
        raise ModelError(
            f"{output} of the ONNX graph differs from PyTorch by {float(largest):.2g}, more than {limit:.2g}",
            location=model.path,
            hint="report this message; --format hf writes the model without a graph",
        )
    return float(largest)


# int8 -----------------------------------------------------------------------------------------------------------------


def _quantize(
    folder: Path, session: Session, model: Model, sequences: Sequence[NDArray[np.int64]], output: str
) -> Int8:
    """Write the graph with weights in int8 and return how it agrees with the float32 graph."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet_export():
        # Unsigned weights: with signed ones, products saturate on processors without VNNI.
        quantize_dynamic(folder / GRAPH, folder / QUANTIZED, weight_type=QuantType.QUInt8)
    quantized = open_session(folder / QUANTIZED)
    size = (folder / QUANTIZED).stat().st_size
    pad_id = model.tokenizer.role_id("pad_token") or 0
    if output == HIDDEN:
        cosines = [
            _cosine(*(run_session(each, [ids], pad_id)[0].mean(0) for each in (session, quantized)))
            for ids in sequences
        ]
        return Int8(min(cosines), len(cosines), None, size)
    first_answers: list[NDArray[np.int64]] = []
    for ids, first_token in ((ids, first) for ids in sequences for first in range(_MASKINGS)):
        positions = np.flatnonzero(np.isin(ids, model.tokenizer.regular_token_ids))[first_token::_MASKED_EVERY]
        masked = ids.copy()
        masked[positions] = model.tokenizer.mask_id
        first = [run_session(each, [masked], pad_id)[0][positions].argmax(-1) for each in (session, quantized)]
        first_answers.append(np.stack([*first, ids[positions]]))
    float32_N, int8_N, labels_N = np.concatenate(first_answers, axis=1)
    accuracy = float((float32_N == labels_N).mean()), float((int8_N == labels_N).mean())
    return Int8(float((float32_N == int8_N).mean()), len(labels_N), accuracy, size)


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


# Model card -----------------------------------------------------------------------------------------------------------


def graph_facts(graph: OnnxGraph) -> Mapping[str, str]:
    """Return the rows of the model card on the graph."""
    facts = {
        GRAPH: f"{graph.bytes / 1e6:,.1f} MB, opset {graph.opset}; {', '.join(graph.inputs)} → {graph.output}",
        "largest difference from PyTorch": f"{graph.difference:.1e}, "
        f"onnxruntime {graph.onnxruntime}, {graph.sequences} texts, {graph.tokens:,} tokens, padded and alone",
    }
    if graph.int8 is not None:
        facts[QUANTIZED] = f"{graph.int8.bytes / 1e6:,.1f} MB; {describe_int8(graph.int8)}"
    return facts


def describe_int8(int8: Int8) -> str:
    """Return in words how the quantized graph agrees with the float32 graph."""
    if int8.accuracy is None:
        return f"cosine with the float32 vectors at least {int8.agreement:.4f} ({int8.positions} texts)"
    return (
        f"the same first answer as float32 at {int8.agreement:.1%} of {int8.positions:,} masked tokens "
        f"(accuracy {int8.accuracy[0]:.1%} in float32, {int8.accuracy[1]:.1%} in int8)"
    )


def usage(graph: OnnxGraph, model: Model) -> str:
    """Return the Markdown of the model card that shows how to use the graph."""
    is_filled = graph.output == LOGITS
    mask = model.tokenizer.id_to_token(model.tokenizer.mask_id)
    text = json.dumps(f"The cat sat on the {mask}." if is_filled else "The cat sat on the mat.", ensure_ascii=False)
    types = ', "token_type_ids": np.zeros_like(ids)' if "token_type_ids" in graph.inputs else ""
    python = (
        "import numpy as np\n"
        "from onnxruntime import InferenceSession\n"
        "from tokenizers import Tokenizer\n\n"
        f'ids = np.array([Tokenizer.from_file("FOLDER/tokenizer.json").encode({text}).ids])\n'
        f'inputs = {{"input_ids": ids, "attention_mask": np.ones_like(ids){types}}}\n'
        f'({graph.output},) = InferenceSession("FOLDER/{GRAPH}").run(None, inputs)'
    )
    dtype = "q8" if graph.int8 is not None else "fp32"
    task = "fill-mask" if is_filled else "feature-extraction"
    call = f"await run({text})" if is_filled else f'await run({text}, {{ pooling: "mean", normalize: true }})'
    browser = (
        'import { env, pipeline } from "@huggingface/transformers";\n\n'
        'env.localModelPath = "/models/";  // the folder that contains FOLDER\n'
        "env.allowRemoteModels = false;\n"
        f'const run = await pipeline("{task}", "FOLDER", {{ dtype: "{dtype}" }});\n'
        f"{call};"
    )
    return f"```python\n{python}\n```\n\nWith transformers.js:\n\n```js\n{browser}\n```"
